"""Rows of a step → tensors → logits."""

from collections import Counter
from collections.abc import Sequence as Rows
from typing import Protocol, runtime_checkable

import torch

from serving.engine.batch import Batch, Chunk
from serving.engine.kv_cache import KVCache
from serving.engine.lora import LoraStacks
from serving.engine.ops.lora import packing_key
from serving.engine.sampler import Greedy, Sample
from serving.engine.sequence import Row, Sequence
from serving.engine.slots import Slot, SlotTable
from serving.engine.spec import DecoderSpec
from serving.engine.vector_file import BaseLayers


class Forward(Protocol):
    """The model as the runner needs it: `model.Model` in torch, `compiled_model` in C++."""

    dtype: torch.dtype
    device: torch.device
    length: int  # tokens of one sequence
    greedy: Greedy  # of its logits
    sample: Sample
    operators: str  # what computes, for people

    @property
    def spec(self) -> DecoderSpec: ...

    @property
    def base_layers(self) -> BaseLayers | None:
        """What vectors of an adapter are relative to; None: rows wear LoRA only."""
        ...

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        """Write the batch's keys and values, return logits [sampled, vocab].

        Running the same batch again writes the same values to the same positions.
        """
        ...


@runtime_checkable
class Capturing(Forward, Protocol):
    """A model that can lay steps down in advance."""

    def capture(self, cache: KVCache, stacks: LoraStacks, rows: int) -> None:
        """Make ready for steps of up to `rows` single tokens. Once, before the first step."""
        ...


class ModelRunner:
    """Packs rows so that neighbours wear the same adapter, and runs the model over them."""

    def __init__(
        self,
        model: Forward,
        cache: KVCache,
        table: SlotTable,
        stacks: LoraStacks,
    ) -> None:
        self.model, self.cache, self.table, self.stacks = model, cache, table, stacks

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
            sequence, stop = row.sequence, row.stop
            if row.count > 1:
                chunks.append(Chunk(len(ids), len(ids) + row.count, sequence.kv_slot, row.start))
            ids += sequence.tokens[row.start : stop]
            positions += range(row.start, stop)
            slots += [sequence.kv_slot] * row.count
            if row.samples:
                sampled.append(len(ids) - 1)
        return Batch(
            ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            singles=len(packed) - len(chunks),
            chunks=tuple(chunks),
            sampled=torch.tensor(sampled, dtype=torch.int64),
            worn=tuple((self._slot(row), row.count) for row in packed),
        )
