"""Keys and values: a slot for each running sequence, and blocks of what may be wanted again."""

import heapq

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

    def block(self, slot: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a view of keys and values of a slot's tokens from `number` · BLOCK on.

        Both are [layers, kv_heads, BLOCK, head_dim].
        """
        place = slice(number * BLOCK, (number + 1) * BLOCK)
        keys, values = (whole[:, slot, :, place] for whole in self._all)
        return keys, values

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

    def write(self, block: int, cache: KVCache, slot: int, number: int) -> None:
        """Copy a slot's block number `number` here."""
        for here, there in zip(self._all[block], cache.block(slot, number), strict=True):
            here.copy_(there)

    def read(self, block: int, cache: KVCache, slot: int, number: int) -> None:
        """Copy a block into a slot, as its block number `number`."""
        for here, there in zip(self._all[block], cache.block(slot, number), strict=True):
            there.copy_(here)


def block_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    return BLOCK * spec.kv_bytes_per_token(dtype)
