"""One step's rows as tensors: what the model reads."""

from dataclasses import dataclass

import torch

from serving.engine.ops.lora import LoraPlan


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first `count` rows: one token each, of different sequences."""

    count: int
    slots: slice | torch.Tensor  # KV slots that attention reads, holes included
    length: int  # positions of a slot that attention reads
    spread: torch.Tensor | None  # row for each of those slots; None: the rows are in slot order
    gather: torch.Tensor | None  # where each row is among those slots
    biases: dict[int | None, torch.Tensor]  # window → [slots, 1, 1, length], 0 or -inf


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start..stop: neighbouring tokens of one sequence, the first at `position`."""

    start: int
    stop: int
    slot: int
    position: int
    masks: dict[
        int | None, torch.Tensor | None
    ]  # window → [chunk, position + chunk], who sees whom


@dataclass(frozen=True, slots=True)
class Batch:
    """Decode rows first, then chunks of prompts."""

    ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    slots: torch.Tensor  # [tokens] KV slot of each row
    decode: DecodeRows | None
    chunks: tuple[Chunk, ...]
    sampled: torch.Tensor  # rows that the head computes
    lora: LoraPlan | None
