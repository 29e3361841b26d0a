"""Loss on held-out answers: how many nats a token of the expected answer costs a variant."""

from collections.abc import Sequence
from dataclasses import replace

from training.data.examples import Example
from training.evaluation.evaluate import Variant
from training.evaluation.forward import Row, load_reader
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
    sums: list[tuple[float, int]] = []
    with load_reader(variant.model, variant.adapter, hardware) as reader:
        for number, example in enumerate(held_out, start=1):
            prompt = asking.prompt_ids(variant.turns(example))
            row = Row(prompt + prompter.completion_ids(example.completion), len(prompt))
            sums.append((reader.loss(row), len(row.ids) - row.start))
            progress(Progress("evaluate", number, len(held_out), f"loss, {variant.name}"))
    return mean_loss(sums, [example.group for example in held_out])
