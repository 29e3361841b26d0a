"""Forward passes of one variant over general text, and over what its base answers."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from registry.base import BaseModel
from training.errors import DataError
from training.evaluation.evaluate import Variant
from training.evaluation.forward import Row, load_reader
from training.model import Hardware
from training.progress import Progress, Report
from training.prompt import Prompter


@dataclass(frozen=True, slots=True)
class Rows:
    """What every variant reads: texts, and the base's answers to the base's prompts."""

    texts: tuple[Row, ...]
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def make(
        cls,
        texts: Sequence[str],
        prompts: Sequence[tuple[int, ...]],
        outputs: Sequence[Sequence[int]],
        prompter: Prompter,
    ) -> "Rows":
        """Encode the texts; cut the answers at their end. Raises DataError for a text too short."""
        end = prompter.end_of_turn
        return cls(
            tuple(_text_row(text, prompter) for text in texts),
            tuple(prompts),
            tuple((*_until(output, end), end) for output in outputs),
        )

    def after(self, prompts: Sequence[tuple[int, ...]]) -> list[Row]:
        """Return the base's answers as if they had been given to these prompts."""
        return [Row(p + said, len(p)) for p, said in zip(prompts, self.answers, strict=True)]


@dataclass(frozen=True, slots=True)
class Read:
    """What forward passes gave: (nats, tokens) for each text and each answer."""

    texts: list[tuple[float, int]]  # −log p of the text
    kl: list[tuple[float, int]]  # KL(base ‖ variant), summed over the tokens of the base's answer
    off: list[str]  # digests of the log-probabilities with the adapter off


def read_variant(
    variant: Variant,
    base: BaseModel,
    rows: Rows,
    prompts: Sequence[tuple[int, ...]],
    hardware: Hardware,
    *,
    progress: Report,
) -> Read:
    """Read the texts, and the base's answers after the variant's prompts.

    KL is Σ p·(log p − log q) over the whole vocabulary at every token: p of the base after its own
    prompt, q of the variant after its prompt.
    """
    other = variant.model.fingerprint != base.fingerprint
    read = Read([], [], [])
    total = len(rows.texts) + len(rows.answers)

    def done() -> None:
        count = len(read.texts) + len(read.kl)
        progress(Progress("evaluate", count, total, f"general text, {variant.name}"))

    with (
        load_reader(variant.model, variant.adapter, hardware) as on,
        load_reader(base, None, hardware) if other else nullcontext(on) as off,
    ):
        for row in rows.texts:
            read.texts.append((on.loss(row), len(row.ids) - row.start))
            done()
        for plain, row in zip(rows.after(rows.prompts), rows.after(prompts), strict=True):
            p, q = off.log_probs(plain, off=True), on.log_probs(row)
            read.kl.append((float((p.exp() * (p - q)).sum()), len(row.ids) - row.start))
            read.off.append(hashlib.sha256(p.contiguous().numpy().tobytes()).hexdigest())
            done()
    return read


def _text_row(text: str, prompter: Prompter) -> Row:
    ids = tuple(prompter.tokenizer.encode(text, add_special_tokens=False))
    if len(ids) < 2:
        raise DataError(f"The general text {text!r} is a single token: nothing predicts it.")
    return Row(ids, 1)


def _until(output: Sequence[int], end: int) -> list[int]:
    ids = list(output)
    return ids[: ids.index(end)] if end in ids else ids
