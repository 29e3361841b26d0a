"""B(A(x)) with another adapter for each row, whatever its rank: two launches a group of linears.

Rows that wear the same adapter are neighbours, cut into tiles; rows that wear nothing are tiles of
rank 0, whose answer is zero. A tile names the slot, and where that slot's A and B lie follows from
its rank and row: every part of an adapter is as many times larger as its rank is. So a launch
depends on no adapter: one that was captured in a graph stays right when adapters are swapped, also
for one of another rank.

A is narrow and long: its inputs are shared out to `splits` programs, and what they found is added
up, always in the same order, by those that multiply with B. What comes out is not added to what the
linear itself gives: that may still be under way, and the kernel that reads both adds them up.
"""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from serving.engine.lora import LoraStacks
from serving.engine.ops.lora import Worn
from serving.engine.slots import BUCKETS

DECODE_HEIGHT = 16  # rows of a tile: what a product takes at least
PROMPT_HEIGHT = 64
TILE = 4  # numbers of a tile: first row, rows, rank, row of the stack
RANKS = tl.constexpr(16)  # of B that one program multiplies at once


@dataclass(frozen=True, slots=True)
class Shares:
    """How the work on tiles of one height is shared out to programs."""

    walkers: int  # programs that walk through the tiles, of which few may be there
    rank_programs: int
    ranks: int  # of A, that one program multiplies at once
    inputs: int
    outputs: int
    splits: int  # at most
    stages: tuple[int, int]  # loads under way of A, and of B
    warps: int  # that multiply with B


SHARES = {
    DECODE_HEIGHT: Shares(64, 4, 16, 128, 256, 8, (5, 3), 4),
    PROMPT_HEIGHT: Shares(16, 1, 64, 64, 128, 16, (4, 1), 8),
}
TILES_AND_SPLITS = 128  # about one for each multiprocessor of a large device
SUMS = 1024  # splits times blocks of outputs at most: each block adds the splits up
# Ranks are multiples of the lowest bucket, and so is where an A or B begins.
ALIGNED = tl.constexpr(BUCKETS[0])


def cut_tiles(worn: Worn, height: int) -> list[int]:
    """Return TILE numbers for each tile of at most `height` rows; `worn` in packing order."""
    tiles: list[int] = []
    start = 0
    for slot, rows in worn:
        rank, place = (slot.bucket, slot.row) if slot else (0, 0)
        stop = start + rows
        for first in range(start, stop, height):
            tiles += (first, min(height, stop - first), rank, place)
        start = stop
    return tiles


@dataclass(frozen=True, slots=True)
class LoraTiles:
    """Who wears what in one step, on the device."""

    table: torch.Tensor  # int32 [tiles, TILE], as `cut_tiles` makes them; one of zeros is dead
    height: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the A of a group, and its B's, begin in an adapter of rank 1, and their sizes."""

    a: int
    b: int
    inputs: int
    outputs: tuple[int, ...]


class Arena:
    """The memory that all slots lie in, and where in a slot each group's A and B are."""

    def __init__(self, stacks: LoraStacks) -> None:
        layout = stacks.layout
        self.memory, self.layers, self.unit = stacks.arena, layout.layers, layout.size(1)
        self.places: dict[str, Place] = {}
        for group in layout.groups:
            first = stacks.whole(group.name)[BUCKETS[0]]
            a, b = (half.storage_offset() // BUCKETS[0] for half in first[:2])
            self.places[group.name] = Place(a, b, group.inputs, tuple(group.outputs))


def lora(x: torch.Tensor, tiles: LoraTiles, arena: Arena, group: str, layer: int) -> torch.Tensor:
    """Return every row's own B(A(x)), [rows, out], for x [rows, in], which lies dense."""
    place, shares, count = arena.places[group], SHARES[tiles.height], len(tiles.table)
    shrunk, y = shrink(x, tiles, arena, group, layer), x.new_empty(len(x), sum(place.outputs))
    _expand[(_blocks(place, shares), min(shares.walkers, count))](
        *(y, shrunk, tiles.table, arena.memory, layer, len(x), count),
        UNIT=arena.unit,
        START=place.b,
        LAYERS=arena.layers,
        OUTS=place.outputs,
        MOST=shrunk.shape[2],
        WIDTH=y.shape[1],
        HEIGHT=tiles.height,
        BLOCK=shares.outputs,
        SPLITS=len(shrunk),
        num_stages=shares.stages[1],
        num_warps=shares.warps,
    )
    return y


def shrink(x: torch.Tensor, tiles: LoraTiles, arena: Arena, group: str, layer: int) -> torch.Tensor:
    """Return A(x), [splits, rows, ranks] in float32, which the splits add up to.

    The ranks of each part are behind those of the part before. Others are not written.
    """
    place, shares, count = arena.places[group], SHARES[tiles.height], len(tiles.table)
    splits, parts = _splits(place, len(x), tiles), len(place.outputs)
    shrunk = x.new_empty(splits, len(x), parts * BUCKETS[-1], dtype=torch.float32)
    _shrink[(min(shares.walkers, count), shares.rank_programs, splits)](
        *(x, shrunk, tiles.table, arena.memory, layer, len(x), count),
        UNIT=arena.unit,
        START=place.a,
        PARTS=parts,
        MOST=shrunk.shape[2],
        WIDTH=place.inputs,
        HEIGHT=tiles.height,
        RANKS=shares.ranks,
        BLOCK=shares.inputs,
        num_stages=shares.stages[0],
    )
    return shrunk


def _splits(place: Place, rows: int, tiles: LoraTiles) -> int:
    """Return a power of two, so that few kernels are compiled."""
    shares = SHARES[tiles.height]
    busy = min(shares.walkers, len(tiles.table))
    if tiles.height == PROMPT_HEIGHT:  # there is room for many tiles, and most of them are full
        busy = min(busy, -(-rows // PROMPT_HEIGHT))
    wanted = min(
        shares.splits,
        SUMS // _blocks(place, shares),
        place.inputs // shares.inputs,
        TILES_AND_SPLITS // busy,
    )
    return 1 << (max(1, wanted).bit_length() - 1)


def _blocks(place: Place, shares: Shares) -> int:
    return sum(-(-out // shares.outputs) for out in place.outputs)


@triton.jit
def alive(tiles, t, count):
    """Return the rows of a tile. Behind the first that has none there are no others."""
    return tl.load(tiles + 4 * t + 1, mask=t < count, other=0)


@triton.jit
def tile(tiles, t, HEIGHT: tl.constexpr):
    """Return a tile's rank, its row of the stack, its rows, and which of them live."""
    start, rows = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    rank, slot = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    tall = tl.arange(0, HEIGHT)
    return tl.multiple_of(rank, ALIGNED), slot, (start + tall).to(tl.int64), tall < rows


@triton.jit(do_not_specialize=["layer", "rows", "count"])
def _shrink(
    x,
    shrunk,
    tiles,
    arena,
    layer,
    rows,
    count,
    UNIT: tl.constexpr,
    START: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """shrunk[split, row] = A · (the split's inputs of x), for this program's tiles and ranks."""
    t, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    while alive(tiles, t, count) > 0:
        rank, slot, row, live = tile(tiles, t, HEIGHT)
        all_ranks = rank * PARTS
        numbers = slot.to(tl.int64) * UNIT + START + layer * (PARTS * WIDTH)
        a = arena + rank.to(tl.int64) * numbers
        for low in range(tl.program_id(1) * RANKS, all_ranks, tl.num_programs(1) * RANKS):
            narrow = low + tl.arange(0, RANKS)
            ranked = narrow < all_ranks
            found = tl.zeros((HEIGHT, RANKS), tl.float32)
            for deep in range(split * BLOCK, WIDTH, splits * BLOCK):
                inner = deep + tl.arange(0, BLOCK)
                inside = inner < WIDTH
                left = tl.load(
                    x + row[:, None] * WIDTH + inner[None, :],
                    mask=live[:, None] & inside[None, :],
                    other=0.0,
                )
                right = tl.load(
                    a + narrow[None, :] * WIDTH + inner[:, None],
                    mask=ranked[None, :] & inside[:, None],
                    other=0.0,
                )
                found += tl.dot(left, right, input_precision="ieee")
            tl.store(
                shrunk + (split.to(tl.int64) * rows + row[:, None]) * MOST + narrow[None, :],
                found,
                mask=live[:, None] & ranked[None, :],
            )
        t += tl.num_programs(0)


@triton.jit
def product(
    shrunk,
    rank,
    part,
    row,
    live,
    rows,
    b,
    wide,
    column,
    MOST: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Return shrunk[row, ranks of a part] · B[column], where B [rank, wide] begins at b."""
    found = tl.zeros((HEIGHT, BLOCK), tl.float32)
    for low in range(0, rank, RANKS):
        narrow = low + tl.arange(0, RANKS)
        ranked = narrow < rank
        left = tl.zeros((HEIGHT, RANKS), tl.float32)
        for split in tl.static_range(SPLITS):
            left += tl.load(
                shrunk + (split * rows + row[:, None]) * MOST + part * rank + narrow[None, :],
                mask=live[:, None] & ranked[None, :],
                other=0.0,
            )
        right = tl.load(
            b + narrow[:, None] * wide + column[None, :],
            mask=ranked[:, None] & (column < wide)[None, :],
            other=0.0,
        )
        found += tl.dot(left.to(right.dtype), right, input_precision="ieee")
    return found


@triton.jit(do_not_specialize=["layer", "rows", "count"])
def _expand(
    y,
    shrunk,
    tiles,
    arena,
    layer,
    rows,
    count,
    UNIT: tl.constexpr,
    START: tl.constexpr,
    LAYERS: tl.constexpr,
    OUTS: tl.constexpr,
    MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y[row, columns of one part] = shrunk[row, that part] · B, for this program's tiles."""
    block, blocks, before, part, first, left_edge, wide = tl.program_id(0), 0, 0, 0, 0, 0, 0
    for p in tl.static_range(len(OUTS)):
        if block >= blocks:
            part, first, left_edge, wide = p, (block - blocks) * BLOCK, before, OUTS[p]
        blocks += tl.cdiv(OUTS[p], BLOCK)
        before += OUTS[p]
    column, t = first + tl.arange(0, BLOCK), tl.program_id(1)
    while alive(tiles, t, count) > 0:
        rank, slot, row, live = tile(tiles, t, HEIGHT)
        numbers = slot.to(tl.int64) * UNIT + START + LAYERS * left_edge + layer * wide
        b = arena + rank.to(tl.int64) * numbers
        found = product(
            shrunk, rank, part, row, live, rows, b, wide, column, MOST, HEIGHT, BLOCK, SPLITS
        )
        tl.store(
            y + row[:, None] * WIDTH + left_edge + column[None, :],
            found.to(y.dtype.element_ty),
            mask=live[:, None] & (column < wide)[None, :],
        )
        t += tl.num_programs(1)
