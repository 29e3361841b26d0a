"""Keys and values: what running sequences hold, and blocks of what may be wanted again."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from serving.engine.pages import QuietPages, lazy_zeros
from serving.engine.spec import DecoderSpec

BLOCK = 16  # tokens
READY = 128 << 20  # bytes of unused blocks whose pages the system has given already, at most


class KVCache(ABC):
    """Keys and values of sequences, each in a slot of its own.

    A slot has room for `length` tokens, and takes memory in blocks as it is filled: all slots
    together hold `blocks` of BLOCK tokens at most.
    """

    keys: Sequence[torch.Tensor]  # one for each layer, as its subclasses say
    values: Sequence[torch.Tensor]

    def __init__(self, slots: int, length: int, blocks: int) -> None:
        self.slots, self.length, self.blocks = slots, length, blocks
        self.free_blocks = blocks
        self._free = list(range(slots))
        self._held = [0] * slots

    def take(self) -> int:
        """Return the lowest free slot: neighbouring slots make attention a view."""
        return heapq.heappop(self._free)

    def held(self, slot: int) -> int:
        """Return the blocks of a slot; a slot of -1 is none."""
        return self._held[slot] if slot >= 0 else 0

    def reserve(self, slot: int, tokens: int) -> bool:
        """Have room for a slot's first `tokens`. False: there is none, and nothing has changed."""
        more = blocks_of(tokens) - self._held[slot]
        if more > self.free_blocks:
            return False
        if more > 0:
            self.free_blocks -= more
            self._held[slot] += more
            self._grow(slot, more)
        return True

    def release(self, slot: int) -> None:
        """Give a slot and its blocks back."""
        self._clear(slot)
        self.free_blocks += self._held[slot]
        self._held[slot] = 0
        heapq.heappush(self._free, slot)

    def write(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put keys and values [layers, kv_heads, n, head_dim] into a slot's first positions."""
        positions = torch.arange(keys.shape[2], device=keys.device)
        slots = torch.full_like(positions, slot)
        for layer, halves in enumerate(zip(keys, values, strict=True)):
            self.store(layer, slots, positions, *(half.transpose(0, 1) for half in halves))

    @abstractmethod
    def store(
        self,
        layer: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        """Put keys and values [rows, kv_heads, head_dim] where slots and positions [rows] say."""

    @abstractmethod
    def copy_out(self, kept: torch.Tensor, blocks: Sequence[int], slot: int, first: int) -> bool:
        """Copy as many blocks of a slot, from its block `first` on, to `blocks` of kept.

        kept is [count, 2, layers, kv_heads, BLOCK · head_dim]. Tell whether all of it is finite.
        """

    @abstractmethod
    def copy_in(self, kept: torch.Tensor, blocks: Sequence[int], slot: int) -> None:
        """Copy `blocks` of kept to the beginning of a slot, which has room for them."""

    @abstractmethod
    def _grow(self, slot: int, more: int) -> None:
        """Find memory for the last `more` blocks that a slot holds."""

    @abstractmethod
    def _clear(self, slot: int) -> None:
        """Make what a slot holds ready for somebody else."""


class KVBlocks:
    """Room for keys and values of `count` times BLOCK tokens, each block in one piece.

    On a CPU the system gives the memory as it is written, and READY bytes ahead in quiet times.
    """

    def __init__(
        self, spec: DecoderSpec, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (count, 2, spec.layers, spec.kv_heads, BLOCK * spec.head_dim)
        self.count = count
        self.size_bytes = block_bytes(spec, dtype)  # of one block
        self._all = lazy_zeros(shape, dtype, device) if count else torch.empty(shape)
        self.pages = QuietPages(self._all, READY)

    def write(self, blocks: Sequence[int], cache: KVCache, slot: int, first: int) -> bool:
        """Copy as many blocks of a slot here, from its block `first` on; tell if all is finite."""
        self.pages.wrote((max(blocks, default=-1) + 1) * self.size_bytes)
        return cache.copy_out(self._all, blocks, slot, first)

    def read(self, blocks: Sequence[int], cache: KVCache, slot: int) -> None:
        """Copy blocks to the beginning of a slot."""
        cache.copy_in(self._all, blocks, slot)


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK)


def block_bytes(spec: DecoderSpec, dtype: torch.dtype) -> int:
    return BLOCK * spec.kv_bytes_per_token(dtype)
