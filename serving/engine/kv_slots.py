"""Keys and values of a sequence in one piece of memory, whose pages the system gives and takes."""

from collections.abc import Sequence
from functools import partial

import torch

from serving.engine.kv_cache import BLOCK, KVCache, blocks_of
from serving.engine.ops.blocks import BlockCopy, CopyBlocks
from serving.engine.pages import give_back, lazy_zeros
from serving.engine.spec import DecoderSpec


class KVSlots(KVCache):
    """[layers] tensors of shape [slots, kv_heads, room, head_dim], one behind the other.

    There is room for `length` tokens, in whole blocks. With `packed_keys`, the keys of a block lie
    as the weights of a linear do, [slots, kv_heads, blocks, head_dim · BLOCK], where a block is
    [head_dim / step, BLOCK, step] and a step one float32 or two bfloat16: scores are then a product
    like that of a linear.

    On a CPU a slot is no more than addresses, and the system's page table is the table of blocks
    that other caches keep themselves (as in arXiv 2405.04437). On a GPU all of it is memory.

    A slot that nobody holds is zero throughout. Attention multiplies masked positions by exactly
    0, and 0 · NaN is NaN: what a poisoned sequence left behind would reach the next one.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        slots: int,
        length: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        copy_blocks: CopyBlocks,
        packed_keys: bool = False,
    ) -> None:
        super().__init__(slots, length, blocks)
        self._packed_keys = packed_keys
        self._copy = copy_blocks
        room = blocks_of(length)
        shape = (spec.layers, slots, spec.kv_heads, room, BLOCK * spec.head_dim)
        # Keys and values: [layers, slots, kv_heads, blocks, BLOCK · head_dim].
        zeros = partial(lazy_zeros, shape, dtype, device, scattered=True)
        self._whole = zeros(), zeros()
        keys, values = (whole.view(*shape[:3], room * BLOCK, -1) for whole in self._whole)
        self.keys = (self._whole[0] if packed_keys else keys).unbind()
        self.values = values.unbind()
        self._touched = [0] * slots  # blocks that the system has given memory for

    def store(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        own = self.keys[layer]
        if self._packed_keys:
            step = 4 // keys.element_size()
            panels = own.view(*own.shape[:3], -1, BLOCK, step)
            steps = keys.reshape(*keys.shape[:2], -1, step)
            panels[slots, :, positions // BLOCK, :, positions % BLOCK] = steps
        else:
            own[slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def copy_out(self, kept: torch.Tensor, blocks: Sequence[int], slot: int, first: int) -> bool:
        return self._copy(kept, self._whole, BlockCopy(blocks, slot, first))

    def copy_in(self, kept: torch.Tensor, blocks: Sequence[int], slot: int) -> None:
        self._copy(kept, self._whole, BlockCopy(blocks, slot, back=True))

    def _grow(self, slot: int, more: int) -> None:  # noqa: ARG002  # all that it holds is known
        self._touched[slot] = max(self._touched[slot], self._held[slot])
        if sum(self._touched) > self.blocks:
            self._give_back()

    def _give_back(self) -> None:
        """Let the system have what shorter sequences leave of slots that longer ones have had."""
        for slot, held in enumerate(self._held):
            if held < self._touched[slot]:
                for whole in self._whole:
                    for layer in whole[:, slot, :, held : self._touched[slot]]:
                        for head in layer:
                            give_back(head)
                self._touched[slot] = held

    def _clear(self, slot: int) -> None:
        for whole in self._whole:
            whole[:, slot, :, : self._held[slot]].zero_()
