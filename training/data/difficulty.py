"""How unlikely the base model finds the answers of examples: what a selection can go by."""

from collections.abc import Sequence

from registry.base import BaseModel
from training.data.examples import Example
from training.data.selection import Difficulty
from training.progress import Progress, Report
from training.prompt import load_prompter


def difficulty_of(base: BaseModel, system: str, report: Report) -> Difficulty:
    """Return a function that asks the base about each example. It is loaded when first asked.

    The difficulty is the mean −log p of the completion's tokens, its end included, in nats.
    """

    def difficulty(examples: Sequence[Example]) -> list[float]:
        # PEFT comes with these: seconds that a check without this question does not take.
        from training.evaluation.forward import Row, in_batches, load_reader
        from training.model import detect_hardware

        prompter = load_prompter(base.path, system)
        encoded = [prompter.encode(example) for example in examples]
        rows = [Row(prompt + completion, len(prompt)) for prompt, completion in encoded]

        def done(count: int) -> None:
            report(Progress("check", count, len(rows), "difficulty"))

        with load_reader(base, None, detect_hardware()) as reader:
            nats = in_batches(rows, lambda row: len(row.ids), reader.losses, done)
        return [of_row / len(said) for of_row, (_, said) in zip(nats, encoded, strict=True)]

    return difficulty
