"""Keys and values: a slot for each running sequence, and blocks of what may be wanted again."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from serving.engine.hardware import lazy_zeros
from serving.engine.spec import DecoderSpec

BLOCK = 16  # tokens


class KVCache:
    """[layers] tensors of shape [slots, kv_heads, room, head_dim], one behind the other.

    There is room for `length` tokens, in whole blocks. With `packed_keys`, the keys of a block lie
    as the weights of a linear do, [slots, kv_heads, blocks, head_dim · BLOCK], where a block is
    [head_dim / step, BLOCK, step] and a step one float32 or two bfloat16: scores are then a product
    like that of a linear.

    A slot that nobody holds is zero throughout. Attention multiplies masked positions by exactly
    0, and 0 · NaN is NaN: what a poisoned sequence left behind would reach the next one.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        packed_keys: bool = False,
    ) -> None:
        blocks = -(-length // BLOCK)
        shape = (spec.layers, slots, spec.kv_heads, blocks, BLOCK * spec.head_dim)
        self.slots = slots
        self.length = length
        self._packed_keys = packed_keys
        self._all = lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)
        keys, values = (whole.view(*shape[:3], blocks * BLOCK, -1) for whole in self._all)
        self.keys = (self._all[0] if packed_keys else keys).unbind()
        self.values = values.unbind()
        self._free = list(range(slots))

    def take(self) -> int:
        """Return the lowest free slot: neighbouring slots make attention a view."""
        return heapq.heappop(self._free)

    def release(self, slot: int, used: int) -> None:
        """Give a slot back; its first `used` positions were written."""
        for whole in self._all:
            whole[:, slot, :, : -(-used // BLOCK)].zero_()
        heapq.heappush(self._free, slot)

    def write(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values [layers, kv_heads, n, head_dim] into a slot's first positions."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        slots = torch.full_like(positions, slot)
        for layer, halves in enumerate(zip(keys, values, strict=True)):
            self.store(layer, slots, positions, *(half.transpose(0, 1) for half in halves))

    def store(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Put keys and values [rows, kv_heads, head_dim] where slots and positions [rows] say."""
        own = self.keys[layer]
        if self._packed_keys:
            step = 4 // keys.element_size()
            panels = own.view(*own.shape[:3], -1, BLOCK, step)
            steps = keys.reshape(*keys.shape[:2], -1, step)
            panels[slots, :, positions // BLOCK, :, positions % BLOCK] = steps
        else:
            own[slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def blocks(self, slot: int, first: int, count: int) -> list[torch.Tensor]:
        """Return views of the keys and of the values of a slot's tokens from `first` · BLOCK on.

        Both are [count, layers, kv_heads, BLOCK · head_dim]. Token i of a sequence is at place i.
        """
        return [whole[:, slot, :, first : first + count].permute(2, 0, 1, 3) for whole in self._all]


class KVBlocks:
    """Room for keys and values of `count` times BLOCK tokens, each block in one piece.

    On a CPU the memory is given when a block is first written.
    """

    def __init__(
        self, spec: DecoderSpec, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (count, 2, spec.layers, spec.kv_heads, BLOCK * spec.head_dim)
        self.count = count
        self.size_bytes = block_bytes(spec, dtype)  # of one block
        self._all = lazy_zeros(shape, dtype, device) if count else torch.empty(shape)

    def write(self, blocks: Sequence[int], cache: KVCache, slot: int, first: int) -> None:
        """Copy as many blocks of a slot here, from its block `first` on."""
        for here, there in self._pairs(blocks, cache, slot, first):
            here.copy_(there)

    def are_finite(self, blocks: Sequence[int]) -> bool:
        """Tell whether blocks have neither NaN nor infinity.

        One of them would be in the sum. So are numbers whose sum overflows: a false alarm.
        """
        sums = [self._all[block].sum(dtype=torch.float32) for block in blocks]
        return not sums or bool(torch.stack(sums).isfinite().all())

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
