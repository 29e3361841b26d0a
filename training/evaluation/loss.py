"""Loss on held-out answers: how many nats a token of the expected answer costs a variant."""

from collections.abc import Sequence
from dataclasses import replace

from training.data.examples import Example
from training.evaluation.evaluate import Variant
from training.evaluation.forward import Row, in_batches, load_reader
from training.evaluation.statistics import Loss, mean_loss
from training.model import Hardware
from training.progress import Progress, Report
from training.prompt import Prompter


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

    def done(count: int) -> None:
        progress(Progress("evaluate", count, len(rows), f"loss, {variant.name}"))

    with load_reader(variant.model, variant.adapter, hardware) as reader:
        nats = in_batches(rows, lambda row: len(row.ids), reader.losses, done)
    sums = [(of_row, len(row.ids) - row.start) for of_row, row in zip(nats, rows, strict=True)]
    return mean_loss(sums, [example.group for example in held_out])
