"""Loss on held-out answers: how many nats a token of the expected answer costs a variant."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from training.data.examples import Example
from training.evaluation.evaluate import Variant
from training.evaluation.forward import Row, load_reader
from training.evaluation.statistics import Loss, mean_loss
from training.model import Hardware
from training.progress import Progress, Report
from training.prompt import Prompter

MAX_TOKENS = 1024  # of a batch with its padding: each has a logit for every word of the vocabulary


def held_out_loss(
    variant: Variant,
    held_out: Sequence[Example],
    prompter: Prompter,
    hardware: Hardware,
    *,
    progress: Report,
) -> Loss:
    """Return the loss of the expected answers, their end included, as training computes it."""
    asking = replace(prompter, system=variant.system)
    rows: list[Row] = []
    for example in held_out:
        prompt = asking.prompt_ids(variant.turns(example))
        rows.append(Row(prompt + prompter.completion_ids(example.completion), len(prompt)))
    nats: dict[int, float] = {}
    with load_reader(variant.model, variant.adapter, hardware) as reader:
        for batch in _batches(rows):
            nats |= zip(batch, reader.losses([rows[number] for number in batch]), strict=True)
            progress(Progress("evaluate", len(nats), len(rows), f"loss, {variant.name}"))
    sums = [(nats[number], len(row.ids) - row.start) for number, row in enumerate(rows)]
    return mean_loss(sums, [example.group for example in held_out])


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield the numbers of rows, those of like length together, MAX_TOKENS at most in a batch."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: len(rows[number].ids)):
        if batch and (len(batch) + 1) * len(rows[number].ids) > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
