"""One step as the Triton operators read it: a row of numbers that lies on the device.

All that changes from step to step is in it, and where rows wear vectors in a table beside it. So
steps of one shape are the same launches.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from serving.engine.batch import Batch, Chunk
from serving.engine.ops.triton import attention, lora
from serving.engine.ops.triton.lora import DECODE_HEIGHT, PROMPT_HEIGHT, LoraTiles
from serving.engine.ops.triton.vectors import RowPlaces, Table, table_of

LINE = 4  # numbers: a kernel is compiled once more for tensors that begin between two lines


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """Rows of one token each stand in front; the others belong to tiles of `chunks`."""

    worn: LoraTiles | None  # None: no row wears anything
    chunks: torch.Tensor  # int32 [tiles, attention.TILE]
    singles: torch.Tensor  # int32 [singles] KV slot of the rows in front, -1 if not of one token
    sampled: torch.Tensor  # int32 [sampled] rows that the head computes
    ids: torch.Tensor  # int32 [rows]
    positions: torch.Tensor  # int32 [rows]
    slots: torch.Tensor  # int32 [rows] KV slot, -1 for a dead row
    vectors: torch.Tensor | None = None  # int64, see VectorBook; None: no row wears any

    @classmethod
    def of(cls, batch: Batch, vectors: RowPlaces, device: torch.device) -> "DeviceStep":
        """Bring a batch to the device, as large as it is."""
        shape = StepShape.of(batch)
        numbers = shape.numbers(batch)
        assert numbers is not None, "a batch fits in its own shape"
        step = shape.view(pinned(numbers, device).to(device, non_blocking=True))
        if vectors:
            table = pinned(table_of(vectors, len(batch.ids)), device)
            return step.with_vectors(table.to(device, non_blocking=True))
        return step if batch.wears else step.without_adapters()

    def with_vectors(self, table: torch.Tensor) -> "DeviceStep":
        return replace(self, vectors=table)

    def without_adapters(self) -> "DeviceStep":
        return replace(self, worn=None)


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step has room for. Room that a batch leaves is dead: nothing is written for it."""

    worn: int  # tiles of LoRA
    chunks: int  # tiles of attention
    singles: int  # rows in front that may be of one token
    sampled: int
    rows: int

    @classmethod
    def of(cls, batch: Batch) -> "StepShape":
        """Return the shape that a batch fills."""
        rows, chunks = len(batch.ids), len(attention.cut_chunks(batch.chunks)) // attention.TILE
        worn = len(lora.cut_tiles(batch.worn, tile_height(rows, chunks))) // lora.TILE
        return cls(worn, chunks, batch.singles, len(batch.sampled), rows)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Numbers of each part of a step, in its order."""
        tiles = (self.worn * lora.TILE, self.chunks * attention.TILE)
        return (*tiles, self.singles, self.sampled, self.rows, self.rows, self.rows)

    def numbers(self, batch: Batch | None) -> list[int] | None:
        """Return a batch as `view` reads it, None when it does not fit in. No batch: all dead."""
        own = [[]] * 7 if batch is None else self._parts(batch)
        numbers: list[int] = []
        for part, room, dead in zip(own, self.rooms, (0, 0, -1, 0, 0, 0, -1), strict=True):
            if len(part) > room:
                return None
            numbers += part
            numbers += [dead] * (_whole_lines(room) - len(part))
        return numbers

    def view(self, numbers: torch.Tensor) -> DeviceStep:
        """See a step in int32 [numbers]."""
        rooms = self.rooms
        lines = numbers.split([_whole_lines(room) for room in rooms])
        worn, chunks, *others = (line[:room] for line, room in zip(lines, rooms, strict=True))
        tiles = LoraTiles(worn.view(-1, lora.TILE), tile_height(self.rows, self.chunks))
        return DeviceStep(tiles, chunks.view(-1, attention.TILE), *others)

    def _parts(self, batch: Batch) -> list[list[int]]:
        """Return what `rooms` are for. Rows behind the batch wear nothing and read nothing."""
        filled, slots = len(batch.ids), batch.slots.tolist()
        worn = (*batch.worn, (None, self.rows - filled))
        chunks = batch.chunks
        if self.chunks:
            chunks = (*chunks, Chunk(filled, self.rows, -1, 0))
        return [
            lora.cut_tiles(worn, tile_height(self.rows, self.chunks)),
            attention.cut_chunks(chunks),
            slots[: batch.singles],
            batch.sampled.tolist(),
            batch.ids.tolist(),
            batch.positions.tolist(),
            slots,
        ]


def tile_height(rows: int, chunks: int) -> int:
    """Return the rows of a tile of LoRA: single tokens may all wear different adapters."""
    return PROMPT_HEIGHT if chunks and rows > PROMPT_HEIGHT else DECODE_HEIGHT


def pinned(numbers: list[int] | Table, device: torch.device) -> torch.Tensor:
    """Return numbers that are copied without waiting: torch keeps the memory until it was read.

    Those of a list are int32.
    """
    # torch.tensor is slower at lists.
    array = np.array(numbers, dtype=np.int32) if isinstance(numbers, list) else numbers
    found = torch.from_numpy(array)
    return found.pin_memory() if device.type == "cuda" else found


def _whole_lines(numbers: int) -> int:
    return -(-numbers // LINE) * LINE
