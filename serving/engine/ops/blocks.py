"""Copies of keys and values between slots and blocks; see `engine.kv_cache`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

Slots = tuple[torch.Tensor, torch.Tensor]  # keys, values


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """As many blocks of a slot, from its block `first` on, into `blocks`; with `back` from them."""

    blocks: Sequence[int]
    slot: int
    first: int = 0
    back: bool = False


CopyBlocks = Callable[[torch.Tensor, Slots, BlockCopy], bool]


def copy_blocks(kept: torch.Tensor, slots: Slots, copy: BlockCopy) -> bool:
    """Copy between `kept` and slots; tell whether neither NaN nor infinity was in what was copied.

    `kept` is [count, 2, layers, kv_heads, numbers], slots are [layers, slots, kv_heads, blocks,
    numbers]. What is not finite would be in the sum. So are numbers whose sum overflows: a false
    alarm.
    """
    sums: list[torch.Tensor] = []
    for here, there in _pairs(kept, slots, copy):
        to, source = (there, here) if copy.back else (here, there)
        sums.append(to.copy_(source).sum(dtype=torch.float32))
    return not sums or bool(torch.stack(sums).isfinite().all())


def _pairs(
    kept: torch.Tensor, slots: Slots, copy: BlockCopy
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views of blocks and of where they are in a slot; neighbours go in one copy."""
    for _, run in groupby(enumerate(copy.blocks, copy.first), key=lambda pair: pair[1] - pair[0]):
        (start, block), *others = run
        count = 1 + len(others)
        halves = kept[block : block + count].unbind(1)
        for here, whole in zip(halves, slots, strict=True):
            yield here, whole[:, copy.slot, :, start : start + count].permute(2, 0, 1, 3)
