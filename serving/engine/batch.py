"""One step's rows as tensors: what the model reads."""

from dataclasses import dataclass

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
    """First `singles` rows of one token each, of different sequences; then chunks of prompts."""

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens] KV slot of each row
    singles: int
    chunks: tuple[Chunk, ...]
    sampled: torch.Tensor  # rows that the head computes
    worn: tuple[tuple[Slot | None, int], ...]  # adapter and number of rows, in order
