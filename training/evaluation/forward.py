"""What a model expects of given text: forward passes through transformers and PEFT, no sampling.

One row at a time: no padding beside it changes a bit, so equal models give equal bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from registry.base import BaseModel
from training.model import Hardware, load_base, peft_without_advice
from training.progress import own_progress_only


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


@contextmanager
def load_reader(model: BaseModel, adapter: Path | None, hardware: Hardware) -> Iterator[Reader]:
    """Load a model, and put the adapter of a folder in PEFT's format on it."""
    with own_progress_only(), peft_without_advice():
        loaded = load_base(model.path, hardware.dtype).to(hardware.device)
        if adapter is not None:
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
        yield Reader(loaded.eval(), adapter is not None)
