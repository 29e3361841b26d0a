"""What rows wear beside LoRA: scales and shifts of linears, weights of norms, rows of tokens.

Where each row's lie is in a table on the device, as places in the arena of the slots. So a launch
depends on no adapter, like those of LoRA, and a captured one stays right when adapters are swapped.
"""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl

from serving.engine.vectors import Dressed, Vectors

GROUPS = ("qkv", "o", "gate_up", "down")
NORMS = 2 * len(GROUPS)  # the field behind those of the groups
FIELDS = NORMS + 4
BLOCK = 1024
LINE = 2  # numbers: a kernel is compiled once more for what begins between two lines

Table = np.ndarray[Any, np.dtype[np.int64]]  # see VectorBook
RowPlaces = Sequence[tuple[slice, Sequence[int]]]  # rows, and their fields of a table


@dataclass(frozen=True, slots=True)
class RowNorms:
    """The weights of norm number `number` of those rows that have their own."""

    arena: torch.Tensor
    places: torch.Tensor  # int64 [rows] where the norms of a row begin, -1 for none
    number: int


class VectorBook:
    """Writes down where vectors lie in an arena, and launches what reads them there.

    A table is int64 [FIELDS, rows], or wider by one. A field is a place in the arena, counted in
    numbers of what lies there, or -1: of scale and shift of each group of linears, of norms, of the
    ids of tokens that have rows of their own, how many these are, and of those rows.
    """

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self._floats, self._ids = arena.view(torch.float32), arena.view(torch.int64)
        self._known: WeakKeyDictionary[Vectors, list[int]] = WeakKeyDictionary()

    def places(self, dressed: Dressed) -> RowPlaces:
        """Return the fields of rows that wear anything that a table says.

        What is computed outside of the layers, a prefix and changed rows of the head, it does not.
        """
        for _, vectors in dressed:
            if vectors not in self._known:
                self._known[vectors] = self._fields(vectors)
        found = [(rows, self._known[vectors]) for rows, vectors in dressed]
        return [(rows, fields) for rows, fields in found if max(fields) >= 0]

    def dress(
        self, y: torch.Tensor, added: torch.Tensor, table: torch.Tensor, group: str, layer: int
    ) -> None:
        """Scale and shift y + added, both [rows, outputs], into y, where a row has a scale.

        There `added` is zero afterwards; other rows stay as they are.
        """
        rows, width = y.shape
        first = 2 * GROUPS.index(group)
        _dress[(rows, triton.cdiv(width, BLOCK))](
            *(y, added, self._floats, table[first], table[first + 1], layer),
            WIDTH=width,
            BLOCK=BLOCK,
        )

    def norms(self, table: torch.Tensor, number: int) -> RowNorms:
        return RowNorms(self._arena, table[NORMS], number)

    def embed(self, x: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> None:
        """Put the rows of changed and virtual tokens into x [rows, hidden], ids int32 [rows]."""
        rows, width = x.shape
        _embed[(rows,)](
            *(x, ids, self._ids, self._arena, *table[NORMS + 1 :]),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
        )

    def _fields(self, vectors: Vectors) -> list[int]:
        fields = [-1] * FIELDS
        for index, group in enumerate(GROUPS):
            for half, tensor in enumerate(vectors.outputs.get(group, ())):
                fields[2 * index + half] = self._place(tensor)
        if vectors.norms is not None:
            fields[NORMS] = self._place(vectors.norms)
        if tokens := vectors.embedding:
            places = self._place(tokens.ids), self._place(tokens.rows)
            fields[NORMS + 1 :] = places[0], len(tokens.ids), places[1]
        return fields

    def _place(self, tensor: torch.Tensor) -> int:
        """Return where it begins in the arena, in numbers of its own type."""
        return (tensor.data_ptr() - self._arena.data_ptr()) // tensor.itemsize


def table_of(places: RowPlaces, rows: int) -> Table:
    """Return the table of so many rows. Every field begins with a line."""
    table = np.full((FIELDS, -(-rows // LINE) * LINE), -1, dtype=np.int64)
    for where, fields in places:
        table[:, where] = np.array(fields)[:, None]
    return table


@triton.jit(do_not_specialize=["layer"])
def _dress(
    y,
    added,
    floats,
    scales,
    shifts,
    layer,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(scales + row)
    if own >= 0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        place, there = row * WIDTH + columns, layer * WIDTH + columns
        value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(floats + own + there, mask=inside, other=0.0)
        value += tl.load(floats + tl.load(shifts + row) + there, mask=inside, other=0.0)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)
        tl.store(added + place, tl.zeros_like(value).to(added.dtype.element_ty), mask=inside)


@triton.jit
def _embed(
    x,
    ids,
    changed,
    arena,
    firsts,
    counts,
    places,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: it looks for its token in the ascending ids, by halves."""
    row = tl.program_id(0).to(tl.int64)
    first, token = tl.load(firsts + row), tl.load(ids + row).to(tl.int64)
    end = tl.load(counts + row)
    low, high = end * 0, end
    while low < high:
        middle = (low + high) // 2
        if tl.load(changed + first + middle) < token:
            low = middle + 1
        else:
            high = middle
    if low < end:  # noqa: SIM102  # both sides of an `and` are computed
        if tl.load(changed + first + low) == token:
            columns = tl.arange(0, BLOCK)
            inside = columns < WIDTH
            own = tl.load(arena + tl.load(places + row) + low * WIDTH + columns, mask=inside)
            tl.store(x + row * WIDTH + columns, own, mask=inside)
