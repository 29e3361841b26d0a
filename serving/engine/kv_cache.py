"""Keys and values: a slot for each running sequence, and blocks of what may be wanted again."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from serving.engine.hardware import lazy_zeros
from serving.engine.spec import DecoderSpec

BLOCK = 16  # tokens


class KVCache:
    """[layers] tensors of shape [slots, kv_heads, length, head_dim], one behind the other.

    A slot that nobody holds is zero throughout. Attention multiplies masked positions by exactly
    0, and 0 · NaN is NaN: what a poisoned sequence left behind would reach the next one.
    """

    def __init__(
        self, spec: DecoderSpec, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.layers, slots, spec.kv_heads, length, spec.head_dim)
        self.slots = slots
        self.length = length
        self._all = lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)
        self.keys, self.values = (whole.unbind() for whole in self._all)
        self._free = list(range(slots))

    def take(self) -> int:
        """Return the lowest free slot: neighbouring slots make attention a view."""
        return heapq.heappop(self._free)

    def release(self, slot: int, used: int) -> None:
        """Give a slot back; its first `used` positions were written."""
        for whole in self._all:
            whole[:, slot, :, :used].zero_()
        heapq.heappush(self._free, slot)

    def write(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values [layers, kv_heads, n, head_dim] into a slot's first positions."""
        for whole, own in zip(self._all, (keys, values), strict=True):
            whole[:, slot, :, : own.shape[2]] = own

    def blocks(self, slot: int, first: int, count: int) -> list[torch.Tensor]:
        """Return views of the keys and of the values of a slot's tokens from `first` · BLOCK on.

        Both are [count, layers, kv_heads, BLOCK, head_dim]. Token i of a sequence is at place i.
        """
        places = slice(first * BLOCK, (first + count) * BLOCK)
        return [
            whole[:, slot, :, places].unflatten(2, (count, BLOCK)).permute(2, 0, 1, 3, 4)
            for whole in self._all
        ]

    def is_finite(self, slot: int, start: int, stop: int) -> bool:
        """Tell whether a slot has neither NaN nor infinity at these positions.

        One of them would be in the sum. So are numbers whose sum overflows: a false alarm.
        """
        sums = [whole[:, slot, :, start:stop].sum(dtype=torch.float32) for whole in self._all]
        return bool(torch.isfinite(sums[0] + sums[1]))


class KVBlocks:
    """Room for keys and values of `count` times BLOCK tokens, each block in one piece.

    On a CPU the memory is given when a block is first written.
    """

    def __init__(
        self, spec: DecoderSpec, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (count, 2, spec.layers, spec.kv_heads, BLOCK, spec.head_dim)
        self.count = count
        self.size_bytes = block_bytes(spec, dtype)  # of one block
        self._all = lazy_zeros(shape, dtype, device) if count else torch.empty(shape)

    def write(self, blocks: Sequence[int], cache: KVCache, slot: int, first: int) -> None:
        """Copy as many blocks of a slot here, from its block `first` on."""
        for here, there in self._pairs(blocks, cache, slot, first):
            here.copy_(there)

    def read(self, blocks: Sequence[int], cache: KVCache, slot: int) -> None:
        """Copy blocks to the beginning of a slot."""
        for here, there in self._pairs(blocks, cache, slot, 0):
            there.copy_(here)

    def _pairs(
        self, blocks: Sequence[int], cache: KVCache, slot: int, first: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield views of blocks and of where they are in a slot; neighbours go in one copy."""
        for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
            (number, block), *others = run
            count = 1 + len(others)
            there = cache.blocks(slot, first + number, count)
            yield from zip(self._all[block : block + count].unbind(1), there, strict=True)


def block_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    return BLOCK * spec.kv_bytes_per_token(dtype)
