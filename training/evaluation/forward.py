"""What a model expects of given text: forward passes through transformers and PEFT, no sampling.

Rows of like length are read together. The models are causal, so what is put behind a row to make it
as long as the others reaches none of its tokens; but how many are read together may change the
last bits. Where bits are compared, equal rows are in equal batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from registry.base import BaseModel
from training.model import Hardware, load_base, peft_without_advice
from training.progress import own_progress_only

PADDING = 0  # any token will do
MAX_TOKENS = 1024  # of a batch with its padding

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, and the place of the first one that counts; what is before it is only read."""

    ids: tuple[int, ...]
    start: int  # 1 or more: nothing predicts the first token


@dataclass(frozen=True, slots=True)
class Reader:
    """A model in memory, with or without an adapter on."""

    model: Any
    adapted: bool

    def log_probs(self, rows: Sequence[Row], *, off: bool = False) -> list[torch.Tensor]:
        """Return natural log-probabilities, fp32 [tokens that count, vocabulary], on the CPU.

        `off` takes the adapter off for this batch.
        """
        return [logits.log_softmax(-1).cpu() for logits in self._logits(rows, off=off)]

    def losses(self, rows: Sequence[Row]) -> list[float]:
        """Return for each row the sum of −log p over the tokens that count, in nats."""
        every = zip(rows, self._logits(rows), strict=True)
        return [
            float(cross_entropy(logits, _targets(row, logits), reduction="sum"))
            for row, logits in every
        ]

    def _logits(self, rows: Sequence[Row], *, off: bool = False) -> list[torch.Tensor]:
        longest, first = max(len(row.ids) for row in rows), min(row.start for row in rows)
        padded = [row.ids + (PADDING,) * (longest - len(row.ids)) for row in rows]
        ids = torch.tensor(padded, device=self.model.device)
        without = self.model.disable_adapter() if off and self.adapted else nullcontext()
        with torch.inference_mode(), without:
            # What predicts the first token that counts, and all behind it; the head is not cheap.
            logits = self.model(input_ids=ids, logits_to_keep=longest - first + 1).logits
        return [
            of_row[row.start - first : len(row.ids) - first].float()
            for row, of_row in zip(rows, logits, strict=True)
        ]


def _targets(row: Row, logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(row.ids[row.start :], device=logits.device)


def in_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    read: Callable[[list[Item]], Sequence[T]],
    done: Callable[[int], None],
) -> list[T]:
    """Return what `read` gives for each item, in the order of the items.

    Those of like length are read together, MAX_TOKENS at most; `done` is told how many were.
    """
    results: dict[int, T] = {}
    for batch in _batches([length(item) for item in items]):
        results |= zip(batch, read([items[number] for number in batch]), strict=True)
        done(len(results))
    return [results[number] for number in range(len(items))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[number] > MAX_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@contextmanager
def load_reader(model: BaseModel, adapter: Path | None, hardware: Hardware) -> Iterator[Reader]:
    """Load a model, and put the adapter of a folder in PEFT's format on it."""
    with own_progress_only(), peft_without_advice():
        loaded = load_base(model.path, hardware.dtype).to(hardware.device)
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
        yield Reader(loaded.eval(), adapter is not None)
