"""y += B(A(x)) with another adapter for each row, whatever its rank: two launches a group.

Rows that wear the same adapter are neighbours, cut into tiles. A tile names its slot; where that
slot's A and B lie is in an address book on the device. So a launch depends on no adapter: one that
was captured in a graph stays right when adapters are swapped, also for one of another rank.

A is narrow and long: its inputs are shared out to `splits` programs, and what they found is added
up, always in the same order, by those that multiply with B.
"""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import torch
import triton
import triton.language as tl

from serving.engine.lora import Halves, LoraStacks
from serving.engine.ops.lora import Worn, merge_runs
from serving.engine.slots import BUCKETS

DECODE_HEIGHT = 16  # rows of a tile: what a product takes at least
PROMPT_HEIGHT = 64
TILE = 4  # numbers of a tile: first row, rows, bucket, row of the stack
HALF = 3  # numbers of an A or B in the book: address, strides from layer to layer, slot to slot
TILE_PROGRAMS = 8  # programs that walk through the tiles; what is not used ends at once
RANK_PROGRAMS = 4
SPLITS = 8
RANKS, INPUTS, OUTPUTS = 16, 128, 128  # that one program multiplies at once
ALIGNMENT = 16  # bytes that a thread reads at once, at best


def cut_tiles(worn: Worn, height: int) -> list[int]:
    """Return TILE numbers for each tile of at most `height` rows; `worn` in packing order."""
    return [
        number
        for run in merge_runs(worn)
        for start in range(run.start, run.stop, height)
        for number in (
            start,
            min(height, run.stop - start),
            BUCKETS.index(run.slot.bucket),
            run.slot.row,
        )
    ]


@dataclass(frozen=True, slots=True)
class LoraTiles:
    """Who wears what in one step, on the device."""

    table: torch.Tensor  # int32 [at least count, TILE], as `cut_tiles` makes them
    count: torch.Tensor  # int32 [1]
    height: int


class AddressBook:
    """Where the slots of every bucket lie, for the kernels to look up; slots never move.

    table [buckets, 1 + HALF · halves]: the rank, then what leads to each A and B.
    """

    def __init__(self, stacks: LoraStacks, dtype: torch.dtype, device: torch.device) -> None:
        groups = stacks.layout.groups
        rows: list[list[int]] = [[bucket] for bucket in BUCKETS]
        self.first: dict[str, int] = {}  # group → place of its A
        for group in groups:
            self.first[group.name] = len(rows[0])
            whole = stacks.whole(group.name)
            for row in rows:
                row += _entry(whole.get(row[0]), 1 + len(group.modules))
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        widths = [n for group in groups for n in (group.inputs, *group.outputs)]
        # Every A and B begins at a multiple of this many bytes, as their memory does.
        self.alignment = gcd(ALIGNMENT, dtype.itemsize * gcd(*widths))
        self.edges = {group.name: Edges.of(group.outputs, device) for group in groups}


def _entry(halves: Halves | None, count: int) -> list[int]:
    """Return HALF numbers for each of `count` halves; zeros for a bucket without room for one."""
    if halves is None:
        return [0] * HALF * count
    return [n for half in halves for n in (half.data_ptr(), half.stride(0), half.stride(1))]


@dataclass(frozen=True, slots=True)
class Edges:
    """Where the linears of a group begin and end in y."""

    unit: int  # divides all of them, so that a kernel may read this many at once
    parts: torch.Tensor  # int32 [parts + 1], in units

    @classmethod
    def of(cls, outputs: Sequence[int], device: torch.device) -> "Edges":
        unit = gcd(ALIGNMENT, *outputs)
        edges = [0, *accumulate(out // unit for out in outputs)]
        return cls(unit, torch.tensor(edges, dtype=torch.int32, device=device))


def apply_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    tiles: LoraTiles,
    book: AddressBook,
    group: str,
    layer: int,
) -> None:
    """Add every row's own B(A(x)) to y in place; x [rows, in] and y [rows, out] lie dense."""
    (rows, inputs), outputs, edges = x.shape, y.shape[1], book.edges[group]
    parts = len(edges.parts) - 1
    most = parts * BUCKETS[-1]
    walkers = min(TILE_PROGRAMS, len(tiles.table))
    # The rows of a prompt are programs enough.
    splits = min(SPLITS, triton.cdiv(inputs, INPUTS)) if tiles.height == DECODE_HEIGHT else 1
    shrunk = torch.empty(splits, rows, most, dtype=torch.float32, device=x.device)
    shared = {
        "PARTS": parts,
        "MOST": most,
        "ENTRY": book.table.shape[1],
        "FIRST": book.first[group],
        "HEIGHT": tiles.height,
        "RANKS": RANKS,
        "ALIGNMENT": book.alignment,
    }
    where = (tiles.table, tiles.count, book.table)
    _shrink[(walkers, RANK_PROGRAMS, splits)](
        *(x, shrunk, *where, layer, rows), WIDTH=inputs, BLOCK=INPUTS, **shared
    )
    # The last block of a part may be partly empty: at most `parts` blocks more than full ones.
    _expand[(walkers, outputs // OUTPUTS + parts)](
        *(y, shrunk, *where, edges.parts, layer, rows),
        **shared,
        WIDTH=outputs,
        UNIT=edges.unit,
        BLOCK=OUTPUTS,
        SPLITS=splits,
    )


@triton.jit
def _tile(tiles, t, book, ENTRY: tl.constexpr, HEIGHT: tl.constexpr):
    """Return a tile's entry in the book, its row of the stack, its rows, and which of them live."""
    start, alive = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    entry, slot = book + tl.load(tiles + 4 * t + 2) * ENTRY, tl.load(tiles + 4 * t + 3)
    tall = tl.arange(0, HEIGHT)
    return entry, slot, (start + tall).to(tl.int64), tall < alive


@triton.jit
def _half(entry, place, layer, slot, kind: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Return the pointer to one layer's A or B of one slot, from its entry in the book."""
    half = entry + place
    first = tl.load(half).to(tl.pointer_type(kind))
    return tl.multiple_of(first + layer * tl.load(half + 1) + slot * tl.load(half + 2), ALIGNMENT)


@triton.jit(do_not_specialize=["layer", "rows"])
def _shrink(
    x,
    shrunk,
    tiles,
    count,
    book,
    layer,
    rows,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    ENTRY: tl.constexpr,
    FIRST: tl.constexpr,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """shrunk[split, row] = A · (the split's inputs of x), for this program's tiles and ranks."""
    split, splits = tl.program_id(2), tl.num_programs(2)
    for t in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        entry, slot, row, live = _tile(tiles, t, book, ENTRY, HEIGHT)
        all_ranks = tl.load(entry) * PARTS
        a = _half(entry, FIRST, layer, slot, x.dtype.element_ty, ALIGNMENT)
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


@triton.jit(do_not_specialize=["layer", "rows"])
def _expand(
    y,
    shrunk,
    tiles,
    count,
    book,
    edges,
    layer,
    rows,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    MOST: tl.constexpr,
    ENTRY: tl.constexpr,
    FIRST: tl.constexpr,
    HEIGHT: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    UNIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """y[row, columns of one part] += shrunk[row, that part] · B, for this program's tiles."""
    block, before, part, first, left_edge, right_edge = tl.program_id(1), 0, 0, 0, 0, 0
    for p in tl.static_range(PARTS):
        begin, end = tl.load(edges + p) * UNIT, tl.load(edges + p + 1) * UNIT
        blocks = tl.cdiv(end - begin, BLOCK)
        mine = (block >= before) & (block < before + blocks)
        part = tl.where(mine, p, part)
        first = tl.where(mine, (block - before) * BLOCK, first)
        left_edge, right_edge = tl.where(mine, begin, left_edge), tl.where(mine, end, right_edge)
        before += blocks
    wide = right_edge - left_edge  # 0 for a block beyond the last part
    column = first + tl.arange(0, BLOCK)
    inside = column < wide
    for t in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        entry, slot, row, live = _tile(tiles, t, book, ENTRY, HEIGHT)
        rank = tl.load(entry)
        b = _half(entry, FIRST + 3 * (1 + part), layer, slot, y.dtype.element_ty, ALIGNMENT)
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
        target = y + row[:, None] * WIDTH + left_edge + column[None, :]
        mask = live[:, None] & inside[None, :]
        old = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (old + found).to(y.dtype.element_ty), mask=mask)
