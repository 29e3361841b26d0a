"""One step as the Triton operators read it: a row of numbers that lies on the device.

All that changes from step to step is in it, so steps of one size are the same launches.
"""

from dataclasses import dataclass, replace

import torch

from serving.engine.batch import Batch
from serving.engine.ops.triton.attention import TILE as CHUNK_TILE
from serving.engine.ops.triton.attention import cut_chunks
from serving.engine.ops.triton.lora import (
    DECODE_HEIGHT,
    PROMPT_HEIGHT,
    TILE,
    LoraTiles,
    cut_tiles,
)


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The first `singles` rows are one token each; the others belong to tiles of `chunks`."""

    ids: torch.Tensor  # int32 [rows]
    positions: torch.Tensor  # int32 [rows]
    slots: torch.Tensor  # int32 [rows] KV slot, -1 for a dead row
    singles: int
    lora: LoraTiles | None  # None: no row wears anything
    chunks: torch.Tensor | None  # int32 [tiles, CHUNK_TILE]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "DeviceStep":
        """Bring a batch to the device, as large as it is."""
        rows = len(batch.ids)
        height = DECODE_HEIGHT if rows <= PROMPT_HEIGHT else PROMPT_HEIGHT
        numbers, chunks = step_numbers(batch, rows, height), cut_chunks(batch.chunks)
        packed = pinned([*numbers, *chunks], device).to(device, non_blocking=True)
        step = cls.view(packed[: len(numbers)], rows, height)
        return replace(
            step if batch.wears else step.without_adapters(),
            singles=batch.singles,
            chunks=packed[len(numbers) :].view(-1, CHUNK_TILE) if chunks else None,
        )

    @classmethod
    def view(cls, numbers: torch.Tensor, rows: int, height: int) -> "DeviceStep":
        """See numbers on the device, laid out by `step_numbers`, as single tokens."""
        ids, positions, slots = numbers[: 3 * rows].split(rows)
        lora = LoraTiles(numbers[3 * rows :].view(-1, TILE), height)
        return cls(ids, positions, slots, rows, lora, None)

    def without_adapters(self) -> "DeviceStep":
        return replace(self, lora=None)


def step_numbers(batch: Batch, rows: int, height: int) -> list[int]:
    """Return ids, positions and slots of `rows` rows, the last of them dead, then LoRA's tiles."""
    dead = rows - len(batch.ids)
    return [
        *(*batch.ids.tolist(), *[0] * dead),
        *(*batch.positions.tolist(), *[0] * dead),
        *(*batch.slots.tolist(), *[-1] * dead),
        *cut_tiles((*batch.worn, (None, dead)), height),
    ]


def pinned(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Return int32 that can be copied without waiting: torch keeps the memory until it was read."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
