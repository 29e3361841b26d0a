"""Copies of keys and values between slots and blocks; see `engine.kv_cache`."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch

Slots = tuple[torch.Tensor, torch.Tensor]  # keys, values


class CopyBlocks(Protocol):
    """See `copy_blocks`."""

    def __call__(
        self,
        kept: torch.Tensor,
        slots: Slots,
        blocks: Sequence[int],
        slot: int,
        first: int,
        *,
        back: bool,
    ) -> bool: ...


def copy_blocks(
    kept: torch.Tensor, slots: Slots, blocks: Sequence[int], slot: int, first: int, *, back: bool
) -> bool:
    """Copy as many blocks of a slot, from its block `first` on, into `blocks` of `kept`.

    `kept` is [count, 2, layers, kv_heads, numbers], slots are [layers, slots, kv_heads, blocks,
    numbers]. With `back` they are copied from there into the slot. Returns whether neither NaN nor
    infinity is in them: it would be in the sum. So are numbers whose sum overflows, a false alarm.
    """
    sums: list[torch.Tensor] = []
    for here, there in _pairs(kept, slots, blocks, slot, first):
        to, source = (there, here) if back else (here, there)
        sums.append(to.copy_(source).sum(dtype=torch.float32))
    return not sums or bool(torch.stack(sums).isfinite().all())


def _pairs(
    kept: torch.Tensor, slots: Slots, blocks: Sequence[int], slot: int, first: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views of blocks and of where they are in a slot; neighbours go in one copy."""
    for _, run in groupby(enumerate(blocks, first), key=lambda pair: pair[1] - pair[0]):
        (start, block), *others = run
        count = 1 + len(others)
        halves = kept[block : block + count].unbind(1)
        for here, whole in zip(halves, slots, strict=True):
            yield here, whole[:, slot, :, start : start + count].permute(2, 0, 1, 3)
