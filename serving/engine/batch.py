"""One step's rows as tensors: what the model reads."""

from dataclasses import dataclass, replace

import torch

from serving.engine.slots import Slot


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start..stop: neighbouring tokens of one sequence, the first at `position`."""

    start: int
    stop: int
    slot: int
    position: int


@dataclass(frozen=True, slots=True)
class Batch:
    """First `singles` rows of one token each, of different sequences; then chunks of prompts.

    The tensors are on the host: who computes elsewhere brings over what it needs at once.
    """

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens] KV slot of each row
    singles: int
    chunks: tuple[Chunk, ...]
    sampled: torch.Tensor  # rows that the head computes
    worn: tuple[tuple[Slot | None, int], ...]  # adapter and number of neighbouring rows, in order

    @property
    def wears(self) -> bool:
        """Tell whether any row wears an adapter."""
        return any(slot is not None for slot, _ in self.worn)

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            sampled=self.sampled.to(device),
        )
