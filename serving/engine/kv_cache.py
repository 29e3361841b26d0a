"""Keys and values: a slot for each running sequence, and blocks of what may be wanted again."""

import heapq
from collections.abc import Sequence

import torch

from serving.engine.ops.blocks import BlockCopy, CopyBlocks
from serving.engine.pages import QuietPages, lazy_zeros
from serving.engine.spec import DecoderSpec

BLOCK = 16  # tokens
READY = 128 << 20  # bytes of unused blocks whose pages the system has given already, at most


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
        # Keys and values: [layers, slots, kv_heads, blocks, BLOCK · head_dim].
        self.whole = lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)
        keys, values = (whole.view(*shape[:3], blocks * BLOCK, -1) for whole in self.whole)
        self.keys = (self.whole[0] if packed_keys else keys).unbind()
        self.values = values.unbind()
        self._free = list(range(slots))

    def take(self) -> int:
        """Return the lowest free slot: neighbouring slots make attention a view."""
        return heapq.heappop(self._free)

    def release(self, slot: int, used: int) -> None:
        """Give a slot back; its first `used` positions were written."""
        for whole in self.whole:
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


class KVBlocks:
    """Room for keys and values of `count` times BLOCK tokens, each block in one piece.

    On a CPU the system gives the memory as it is written, and READY bytes ahead in quiet times.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        copy_blocks: CopyBlocks,
    ) -> None:
        shape = (count, 2, spec.layers, spec.kv_heads, BLOCK * spec.head_dim)
        self.count = count
        self.size_bytes = block_bytes(spec, dtype)  # of one block
        self._all = lazy_zeros(shape, dtype, device) if count else torch.empty(shape)
        self.pages = QuietPages(self._all, READY)
        self._copy = copy_blocks

    def write(self, blocks: Sequence[int], cache: KVCache, slot: int, first: int) -> bool:
        """Copy as many blocks of a slot here, from its block `first` on; tell if all is finite."""
        self.pages.wrote((max(blocks, default=-1) + 1) * self.size_bytes)
        return self._copy(self._all, cache.whole, BlockCopy(blocks, slot, first))

    def read(self, blocks: Sequence[int], cache: KVCache, slot: int) -> None:
        """Copy blocks to the beginning of a slot."""
        self._copy(self._all, cache.whole, BlockCopy(blocks, slot, back=True))


def block_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    return BLOCK * spec.kv_bytes_per_token(dtype)
