"""Keys and values in pages that lie anywhere, for operators that look each of them up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from serving.engine.kv_cache import BLOCK, KVCache, blocks_of
from serving.engine.spec import DecoderSpec

PIECE = 64  # blocks that are gathered at once: the copy between takes memory, too


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Keys and values of a layer as operators read them."""

    keys: torch.Tensor  # [pages, kv_heads, BLOCK, head_dim]
    values: torch.Tensor
    table: torch.Tensor  # int32 [slots, room]: the page of each block of a slot


class KVPages(KVCache):
    """[layers] tensors of shape [pages, kv_heads, BLOCK, head_dim], and a table of whose they are.

    What the table says of blocks that a slot does not hold, and what lies in their pages, means
    nothing: operators read what a sequence has written, and no more.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        slots: int,
        length: int,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(slots, length, blocks)
        self.room = blocks_of(length)  # of a slot, in blocks
        shape = (spec.layers, blocks, spec.kv_heads, BLOCK, spec.head_dim)
        zeros = partial(torch.zeros, shape, dtype=dtype, device=device)
        self._whole = zeros(), zeros()
        self.keys, self.values = (whole.unbind() for whole in self._whole)
        self.table = torch.zeros(slots, self.room, dtype=torch.int32, device=device)
        self._pages: list[list[int]] = [[] for _ in range(slots)]
        self._unused = list(range(blocks))[::-1]
        self._new: dict[int, int] = {}  # place in the table → page, not on the device yet

    def layer(self, index: int) -> LayerPages:
        return LayerPages(self.keys[index], self.values[index], self.table)

    def settle(self) -> None:
        """Bring what slots have been given to the table. Call it before anything reads that."""
        if self._new:
            new = torch.tensor(list(self._new.items()), dtype=torch.int32)
            if self.table.is_cuda:
                new = new.pin_memory()
            places, pages = new.to(self.table.device, non_blocking=True).unbind(1)
            self.table.view(-1)[places] = pages
            self._new.clear()

    def store(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self.settle()
        pages, places = self.table[slots, positions // BLOCK], positions % BLOCK
        self.keys[layer][pages, :, places] = keys
        self.values[layer][pages, :, places] = values

    def copy_out(self, kept: torch.Tensor, blocks: Sequence[int], slot: int, first: int) -> bool:
        finite = True
        for here, there in self._pieces(blocks, slot, first):
            for half, whole in enumerate(self._whole):
                copied = whole[:, there].flatten(3).transpose(0, 1)
                kept[here, half] = copied
                finite = finite and bool(copied.isfinite().all())
        return finite

    def copy_in(self, kept: torch.Tensor, blocks: Sequence[int], slot: int) -> None:
        for here, there in self._pieces(blocks, slot, 0):
            for half, whole in enumerate(self._whole):
                whole.flatten(3)[:, there] = kept[here, half].transpose(0, 1)

    def _pieces(
        self, blocks: Sequence[int], slot: int, first: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield numbers of blocks and of the pages of a slot from block `first` on, PIECE each."""
        pages = self._pages[slot][first : first + len(blocks)]
        for start in range(0, len(blocks), PIECE):
            pair = torch.tensor([blocks[start : start + PIECE], pages[start : start + PIECE]])
            here, there = pair.to(self.table.device)
            yield here, there

    def _grow(self, slot: int, more: int) -> None:
        pages = [self._unused.pop() for _ in range(more)]
        start = slot * self.room + len(self._pages[slot])
        self._new |= zip(range(start, start + more), pages, strict=True)
        self._pages[slot] += pages

    def _clear(self, slot: int) -> None:  # nobody reads what is left
        self._unused += reversed(self._pages[slot])
        self._pages[slot].clear()
