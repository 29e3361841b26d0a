"""What a model expects of given text: forward passes through transformers and PEFT, no sampling.

Where bits are compared, one row at a time: nothing beside it changes a bit, so equal models give
equal bits. Where sums are wanted, several at once: the models are causal, so what is put behind a
row to make it as long as the others reaches none of its tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from registry.base import BaseModel
from training.model import Hardware, load_base, peft_without_advice
from training.progress import own_progress_only

PADDING = 0  # any token will do


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

    def log_probs(self, row: Row, *, off: bool = False) -> torch.Tensor:
        """Return natural log-probabilities, fp32 [tokens that count, vocabulary], on the CPU.

        `off` takes the adapter off for this row.
        """
        ids = torch.tensor([row.ids], device=self.model.device)
        without = self.model.disable_adapter() if off and self.adapted else nullcontext()
        with torch.inference_mode(), without:
            logits = self.model(input_ids=ids).logits[0, -len(row.ids) :]  # virtual tokens left out
        return logits[row.start - 1 : -1].float().log_softmax(-1).cpu()

    def loss(self, row: Row) -> float:
        """Return the sum of −log p over the tokens that count, in nats."""
        targets = torch.tensor(row.ids[row.start :])[:, None]
        return -float(self.log_probs(row).gather(1, targets).sum())

    def losses(self, rows: Sequence[Row]) -> list[float]:
        """Return the `loss` of each row of one batch; equal to it but for rounding."""
        longest = max(len(row.ids) for row in rows)
        padded = [row.ids + (PADDING,) * (longest - len(row.ids)) for row in rows]
        with torch.inference_mode():
            ids = torch.tensor(padded, device=self.model.device)
            logits = self.model(input_ids=ids).logits[:, -longest:]  # virtual tokens left out
            return [self._loss(row, of_row) for row, of_row in zip(rows, logits, strict=True)]

    def _loss(self, row: Row, logits: torch.Tensor) -> float:
        counting = logits[row.start - 1 : len(row.ids) - 1].float()
        targets = torch.tensor(row.ids[row.start :], device=counting.device)
        return float(cross_entropy(counting, targets, reduction="sum"))


@contextmanager
def load_reader(model: BaseModel, adapter: Path | None, hardware: Hardware) -> Iterator[Reader]:
    """Load a model, and put the adapter of a folder in PEFT's format on it."""
    with own_progress_only(), peft_without_advice():
        loaded = load_base(model.path, hardware.dtype).to(hardware.device)
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
        yield Reader(loaded.eval(), adapter is not None)
