"""Rows of a step → tensors → logits."""

from collections import Counter
from collections.abc import Sequence as Rows
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from serving.engine.batch import Batch, Chunk
from serving.engine.kv_cache import KVCache
from serving.engine.lora import LoraStacks
from serving.engine.ops.lora import packing_key
from serving.engine.ops.native.library import Library
from serving.engine.sampler import Greedy, Sample
from serving.engine.sequence import Row, Sequence
from serving.engine.slots import Slot, SlotTable
from serving.engine.spec import DecoderSpec
from serving.engine.vector_file import BaseLayers

Dressed = tuple[Slot | None, Row]  # what a row wears, and the row


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
    def library(self) -> Library | None:
        """The compiled operators: they write adapters and read every B as `lora.pack_b` has it."""
        ...

    @property
    def base_layers(self) -> BaseLayers:
        """What vectors of an adapter are relative to."""
        ...

    def kv_cache(self, slots: int, blocks: int) -> KVCache:
        """Return an empty cache, as `forward` takes it."""
        ...

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        """Write the batch's keys and values, return logits [sampled, vocab].

        Running the same batch again writes the same values to the same positions.
        """
        ...


@runtime_checkable
class Capturing(Forward, Protocol):
    """A model that can lay steps down in advance."""

    def capture(self, cache: KVCache, stacks: LoraStacks, rows: int, tokens: int) -> None:
        """Make ready for steps of `rows` sequences and `tokens` at most. Once, before the first."""
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
        logits = self.model.forward(_batch(packed), self.cache, self.stacks)
        return logits, [row.sequence for _, row in packed if row.samples]

    def _pack(self, rows: Rows[Row]) -> list[Dressed]:
        """Order the rows: single tokens, then chunks; inside each by adapter, then by KV slot."""
        dressed = [(self._slot(row.sequence), row) for row in rows]
        singles = [pair for pair in dressed if pair[1].count == 1]
        chunks = [pair for pair in dressed if pair[1].count > 1]
        return [*_by_adapter(singles), *_by_adapter(chunks)]

    def _slot(self, sequence: Sequence) -> Slot | None:
        # Looked up by digest at every step: a remembered slot could be somebody else's by now.
        adapter = sequence.adapter
        return None if adapter is None else self.table.slot_of(adapter.digest)


def _by_adapter(rows: Rows[Dressed]) -> list[Dressed]:
    counts: Counter[Slot | None] = Counter()
    for slot, row in rows:
        counts[slot] += row.count
    keys = {slot: packing_key(slot, count) for slot, count in counts.items()}
    return sorted(rows, key=lambda pair: (keys[pair[0]], pair[1].sequence.kv_slot))


def _batch(packed: Rows[Dressed]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    chunks: list[Chunk] = []
    sampled: list[int] = []
    worn: list[tuple[Slot | None, int]] = []
    for slot, row in packed:
        sequence, start, count = row.sequence, row.start, row.count
        if count == 1:
            ids.append(sequence.tokens[start])
            positions.append(start)
            slots.append(sequence.kv_slot)
        else:
            chunks.append(Chunk(len(ids), len(ids) + count, sequence.kv_slot, start))
            ids += sequence.tokens[start : start + count]
            positions += range(start, start + count)
            slots += [sequence.kv_slot] * count
        if row.samples:
            sampled.append(len(ids) - 1)
        if worn and worn[-1][0] is slot:
            count += worn.pop()[1]
        worn.append((slot, count))
    # By way of numpy: torch.tensor takes five times as long for a list of 500.
    return Batch(
        ids=torch.from_numpy(np.array(ids)),
        positions=torch.from_numpy(np.array(positions)),
        slots=torch.from_numpy(np.array(slots)),
        singles=len(packed) - len(chunks),
        chunks=tuple(chunks),
        sampled=torch.tensor(sampled, dtype=torch.int64),
        worn=tuple(worn),
    )
