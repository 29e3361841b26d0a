"""Forward passes of one variant over general text, and over what its base answers."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from registry.base import BaseModel
from training.errors import DataError
from training.evaluation.evaluate import Variant
from training.evaluation.forward import Row, in_batches, load_reader
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
    answers = list(zip(rows.after(rows.prompts), rows.after(prompts), strict=True))
    total = len(rows.texts) + len(answers)

    def done(count: int) -> None:
        progress(Progress("evaluate", count, total, f"general text, {variant.name}"))

    with (
        load_reader(variant.model, variant.adapter, hardware) as on,
        load_reader(base, None, hardware) if other else nullcontext(on) as off,
    ):

        def compare(batch: list[tuple[Row, Row]]) -> list[tuple[float, str]]:
            of_base = off.log_probs([plain for plain, _ in batch], off=True)
            of_variant = on.log_probs([row for _, row in batch])
            return [
                (float((p.exp() * (p - q)).sum()), _digest(p))
                for p, q in zip(of_base, of_variant, strict=True)
            ]

        losses = in_batches(rows.texts, lambda row: len(row.ids), on.losses, done)
        compared = in_batches(answers, _longer, compare, lambda n: done(len(losses) + n))
    return Read(
        [(nats, len(row.ids) - row.start) for nats, row in zip(losses, rows.texts, strict=True)],
        [
            (nats, len(row.ids) - row.start)
            for (nats, _), (_, row) in zip(compared, answers, strict=True)
        ],
        [digest for _, digest in compared],
    )


def _longer(pair: tuple[Row, Row]) -> int:
    return max(len(row.ids) for row in pair)


def _digest(log_probs: torch.Tensor) -> str:
    return hashlib.sha256(log_probs.contiguous().numpy().tobytes()).hexdigest()


def _text_row(text: str, prompter: Prompter) -> Row:
    ids = tuple(prompter.tokenizer.encode(text, add_special_tokens=False))
    if len(ids) < 2:
        raise DataError(f"The general text {text!r} is a single token: nothing predicts it.")
    return Row(ids, 1)


def _until(output: Sequence[int], end: int) -> list[int]:
    ids = list(output)
    return ids[: ids.index(end)] if end in ids else ids
