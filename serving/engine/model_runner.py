"""Rows of a step → tensors → logits."""

from collections import Counter
from collections.abc import Sequence as Rows
from typing import Protocol

import torch

from serving.engine.batch import Batch, Chunk, DecodeRows
from serving.engine.kv_cache import KVCache
from serving.engine.lora import LoraStacks
from serving.engine.ops.attention import chunk_mask
from serving.engine.ops.lora import LoraPlan, packing_key, plan_lora
from serving.engine.sequence import Row, Sequence
from serving.engine.slots import Slot, SlotTable
from serving.engine.spec import ModelSpec

LENGTH_STEP = 32  # attention reads a multiple of this many positions, so few shapes occur


class Forward(Protocol):
    """The model as the runner needs it; `serving.engine.model.Model` is the one that computes."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    length: int  # tokens of one sequence

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor: ...


class ModelRunner:
    """Packs rows so that neighbours wear the same adapter, and runs the model over them."""

    def __init__(
        self,
        model: Forward,
        cache: KVCache,
        table: SlotTable,
        stacks: LoraStacks,
        windows: frozenset[int | None],
    ) -> None:
        self.model, self.cache, self.table, self.stacks = model, cache, table, stacks
        self.windows = windows
        self._plan_key: tuple[tuple[Slot | None, int], ...] = ()
        self._plan: LoraPlan | None = None

    def run(self, rows: Rows[Row]) -> tuple[torch.Tensor, list[Sequence]]:
        """Return logits [sampled, vocab] and the sequence that each of them belongs to.

        Repeating it with the same rows, or some of them, gives the same and harms nothing.
        """
        packed = self._pack(rows)
        logits = self.model.forward(self._batch(packed), self.cache, self.stacks)
        return logits, [row.sequence for row in packed if row.samples]

    def _pack(self, rows: Rows[Row]) -> list[Row]:
        """Order the rows: single tokens, then chunks; inside each by adapter, then by KV slot."""
        singles = [row for row in rows if row.count == 1]
        chunks = [row for row in rows if row.count > 1]
        return [*self._by_adapter(singles), *self._by_adapter(chunks)]

    def _by_adapter(self, rows: Rows[Row]) -> list[Row]:
        worn: Counter[Slot | None] = Counter()
        for row in rows:
            worn[self._slot(row)] += row.count

        def key(row: Row) -> tuple[tuple[int, ...], int]:
            slot = self._slot(row)
            return packing_key(slot, worn[slot]), row.sequence.kv_slot

        return sorted(rows, key=key)

    def _slot(self, row: Row) -> Slot | None:
        # Looked up by digest at every step: a remembered slot could be somebody else's by now.
        adapter = row.sequence.adapter
        return None if adapter is None else self.table.slot_of(adapter.digest)

    def _batch(self, packed: Rows[Row]) -> Batch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        chunks: list[Chunk] = []
        sampled: list[int] = []
        for row in packed:
            sequence, stop = row.sequence, row.start + row.count
            if row.count > 1:
                chunks.append(self._chunk(row, len(ids)))
            ids += sequence.tokens[row.start : stop]
            positions += range(row.start, stop)
            slots += [sequence.kv_slot] * row.count
            if row.samples:
                sampled.append(len(ids) - 1)
        singles = len(packed) - len(chunks)
        return Batch(
            ids=self._tensor(ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            decode=self._decode_rows(slots[:singles], positions[:singles]) if singles else None,
            chunks=tuple(chunks),
            sampled=self._tensor(sampled),
            lora=self._lora_plan(packed),
        )

    def _chunk(self, row: Row, at: int) -> Chunk:
        masks = {
            window: chunk_mask(row.count, row.start + row.count, window, self.model.device)
            for window in self.windows
        }
        return Chunk(at, at + row.count, row.sequence.kv_slot, row.start, masks)

    def _lora_plan(self, packed: Rows[Row]) -> LoraPlan | None:
        """Plan the adapters of this step; a decode step is mostly packed like the one before."""
        key = tuple((self._slot(row), row.count) for row in packed)
        if key != self._plan_key:
            self._plan, self._plan_key = plan_lora(key, self.model.device), key
        return self._plan

    def _decode_rows(self, slots: list[int], positions: list[int]) -> DecodeRows:
        low, high = min(slots), max(slots) + 1
        dense = high - low <= 2 * len(slots)
        order = [slot - low for slot in slots] if dense else list(range(len(slots)))
        span = high - low if dense else len(slots)
        spread = [0] * span  # a hole reads row 0's query; nobody reads its answer
        for row, place in enumerate(order):
            spread[place] = row
        in_order = order == list(range(span))
        length = min(self.cache.length, -(-(max(positions) + 1) // LENGTH_STEP) * LENGTH_STEP)
        last = self._tensor([positions[row] for row in spread])
        return DecodeRows(
            count=len(slots),
            slots=slice(low, high) if dense else self._tensor(slots),
            length=length,
            spread=None if in_order else self._tensor(spread),
            gather=None if in_order else self._tensor(order),
            biases={window: self._bias(last, length, window) for window in self.windows},
        )

    def _bias(self, last: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        """Return [n, 1, 1, length]: 0 where position `last` sees a key, -inf elsewhere."""
        keys = torch.arange(length, device=last.device)[None]
        seen = keys <= last[:, None]
        if window is not None:
            seen &= keys > last[:, None] - window
        # CUDA wants the type of the queries; on the CPU float32 is the faster mask.
        dtype = torch.float32 if last.device.type == "cpu" else self.cache.keys[0].dtype
        zeros = torch.zeros(seen.shape, dtype=dtype, device=last.device)
        return zeros.masked_fill_(~seen, -torch.inf)[:, None, None]

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
