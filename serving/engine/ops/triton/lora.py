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
# Programs that walk through the tiles. Where there is room for more tiles than there are as a rule,
# the same programs look at the others, and there are none that only end.
TILE_PROGRAMS = {DECODE_HEIGHT: 64, PROMPT_HEIGHT: 16}
RANK_PROGRAMS = 4
PROGRAMS = 512  # about four for each multiprocessor of a large device
MOST_SPLITS = {DECODE_HEIGHT: 8, PROMPT_HEIGHT: 2}
STAGES = {DECODE_HEIGHT: 5, PROMPT_HEIGHT: 3}  # loads under way; those of a prompt are large
RANKS, INPUTS = 16, 128  # that one program multiplies at once
OUTPUTS = {DECODE_HEIGHT: 256, PROMPT_HEIGHT: 128}
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
    place, rows, count = arena.places[group], len(x), len(tiles.table)
    parts, outputs = len(place.outputs), sum(place.outputs)
    most = parts * BUCKETS[-1]
    walkers, block = min(TILE_PROGRAMS[tiles.height], count), OUTPUTS[tiles.height]
    splits = _splits(walkers * RANK_PROGRAMS, place.inputs, MOST_SPLITS[tiles.height])
    shrunk = x.new_empty(splits, rows, most, dtype=torch.float32)
    y = x.new_empty(rows, outputs)
    _shrink[(walkers, RANK_PROGRAMS, splits)](
        *(x, shrunk, tiles.table, arena.memory, layer, rows, count),
        UNIT=arena.unit,
        START=place.a,
        PARTS=parts,
        MOST=most,
        WIDTH=place.inputs,
        HEIGHT=tiles.height,
        RANKS=RANKS,
        BLOCK=INPUTS,
        num_stages=STAGES[tiles.height],
    )
    _expand[(sum(triton.cdiv(out, block) for out in place.outputs), walkers)](
        *(y, shrunk, tiles.table, arena.memory, layer, rows, count),
        UNIT=arena.unit,
        START=place.b,
        LAYERS=arena.layers,
        OUTS=place.outputs,
        MOST=most,
        WIDTH=outputs,
        HEIGHT=tiles.height,
        RANKS=RANKS,
        BLOCK=block,
        SPLITS=splits,
    )
    return y


def _splits(programs: int, inputs: int, most: int) -> int:
    """Return a power of two, so that few kernels are compiled."""
    wanted = max(1, min(most, PROGRAMS // programs, inputs // INPUTS))
    return 1 << (wanted.bit_length() - 1)


@triton.jit
def _tile(tiles, t, HEIGHT: tl.constexpr):
    """Return a tile's rank, its row of the stack, its rows, and which of them live."""
    start, alive = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    rank, slot = tl.load(tiles + 4 * t + 2), tl.load(tiles + 4 * t + 3)
    tall = tl.arange(0, HEIGHT)
    return rank, slot, (start + tall).to(tl.int64), tall < alive


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
    split, splits = tl.program_id(2), tl.num_programs(2)
    for t in range(tl.program_id(0), count, tl.num_programs(0)):
        rank, slot, row, live = _tile(tiles, t, HEIGHT)
        all_ranks = rank * PARTS
        first = rank.to(tl.int64) * (slot.to(tl.int64) * UNIT + START + layer * (PARTS * WIDTH))
        a = arena + tl.multiple_of(first, ALIGNED)
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
    RANKS: tl.constexpr,
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
    column = first + tl.arange(0, BLOCK)
    inside = column < wide
    for t in range(tl.program_id(1), count, tl.num_programs(1)):
        rank, slot, row, live = _tile(tiles, t, HEIGHT)
        numbers = slot.to(tl.int64) * UNIT + START + LAYERS * left_edge + layer * wide
        b = arena + tl.multiple_of(rank.to(tl.int64) * numbers, ALIGNED)
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
                mask=ranked[:, None] & inside[None, :],
                other=0.0,
            )
            found += tl.dot(left.to(right.dtype), right, input_precision="ieee")
        tl.store(
            y + row[:, None] * WIDTH + left_edge + column[None, :],
            found.to(y.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )
