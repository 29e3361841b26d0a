"""Attention over the pages of the cache: one token of many sequences, or many tokens of one.

Decoding, a sequence's keys are shared out to `splits` programs when there are fewer sequences than
the device has places for; a second kernel puts the shares together (arXiv 2311.01282). Lengths are
read on the device, so one launch, captured once, serves whatever the sequences have grown to.

Chunks of prompts are cut into tiles of queries. torch's own attention computes shared KV heads fast
without a mask only, by its documentation, and a chunk that follows others needs one.
"""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from collections.abc import Iterable

import torch
import triton
import triton.language as tl

from serving.engine.batch import Chunk
from serving.engine.kv_pages import LayerPages

PROGRAMS = 256  # about two for each multiprocessor of a large device
MOST_SPLITS = 16
FEW = 8  # rows that decode, as a rule, where there is room for more
KEY_BYTES = 128  # one program multiplies this over the size of a number keys at once
QUERIES = 64  # of a tile
TILE = 4  # numbers of a tile: first row, rows, slot, position of the first row
# What an empty share has: finite, so that no difference of two of them is NaN.
LOWEST = tl.constexpr(-1e30)
LEAST = tl.constexpr(1e-30)


def decode_attention(
    qkv: torch.Tensor,
    pages: LayerPages,
    slots: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
    few: bool = False,
) -> None:
    """Write out [at least rows, heads, dim] for the queries in front of qkv [.., columns, dim].

    Both are dense; slots and positions int32 [rows]. Row i sees the positions up to its own, and of
    those the last `window`. A row of slot -1 is dead: zero. Work is shared out as if all rows were
    alive, or only a few of them.
    """
    rows, (_, columns, dim) = len(slots), qkv.shape
    _, kv_heads, size, _ = pages.keys.shape
    room = pages.table.shape[1]
    heads = columns - 2 * kv_heads
    splits = _splits((min(rows, FEW) if few else rows) * kv_heads)
    shares = out if splits == 1 else qkv.new_empty(rows, heads, splits, dim, dtype=torch.float32)
    scales = qkv.new_empty(rows, heads, splits, dtype=torch.float32)
    block = max(16, triton.next_power_of_2(dim))
    _attend[(rows, kv_heads, splits)](
        qkv,
        pages.keys,
        pages.values,
        pages.table,
        slots,
        positions,
        shares,
        scales,
        dim**-0.5,
        room,
        window or room * size,
        COLUMNS=columns,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),  # what a product takes at least
        DIM=dim,
        BLOCK=block,
        PAGE=size,
        KEYS=KEY_BYTES // qkv.itemsize,
        SPLITS=splits,
    )
    if splits > 1:
        _combine[(rows, heads)](shares, scales, out, DIM=dim, BLOCK=block, SPLITS=splits)


def cut_chunks(chunks: Iterable[Chunk]) -> list[int]:
    """Return TILE numbers for each tile of at most QUERIES neighbouring tokens."""
    return [
        number
        for chunk in chunks
        for start in range(chunk.start, chunk.stop, QUERIES)
        for number in (
            start,
            min(QUERIES, chunk.stop - start),
            chunk.slot,
            chunk.position + start - chunk.start,
        )
    ]


def chunk_attention(
    qkv: torch.Tensor,
    pages: LayerPages,
    tiles: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Do what `decode_attention` does for the rows of tiles int32 [tiles, TILE] of `cut_chunks`.

    Rows of slot -1 are zero here, too. A tile of zeros has no rows.
    """
    (_, columns, dim), (_, kv_heads, size, _) = qkv.shape, pages.keys.shape
    room = pages.table.shape[1]
    heads = columns - 2 * kv_heads
    _attend_chunk[(len(tiles), heads)](
        qkv,
        pages.keys,
        pages.values,
        pages.table,
        tiles,
        out,
        dim**-0.5,
        room,
        window or room * size,
        COLUMNS=columns,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK=max(16, triton.next_power_of_2(dim)),
        PAGE=size,
        QUERIES=QUERIES,
        KEYS=KEY_BYTES // qkv.itemsize,
        num_stages=2,  # with three, float32 takes more shared memory than some devices have
    )


def _splits(programs: int) -> int:
    return min(MOST_SPLITS, triton.next_power_of_2(max(1, PROGRAMS // programs)))


@triton.jit
def _take_in(most, weight, mean, scores, v):
    """Return the running maximum, sum and weighted values with one more block of keys (softmax)."""
    higher = tl.maximum(most, tl.max(scores, axis=1))
    chances = tl.exp(scores - higher[:, None])
    fade = tl.exp(most - higher)
    weight = weight * fade + tl.sum(chances, axis=1)
    mean = mean * fade[:, None] + tl.dot(chances.to(v.dtype), v, input_precision="ieee")
    return higher, weight, mean


@triton.jit
def _offsets(
    own,
    place,
    seen,
    kv_head,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Return where the heads [places, 1] of a sequence begin, whose row of the table is `own`."""
    page = tl.load(own + place // PAGE, mask=seen, other=0).to(tl.int64)
    return (((page * KV_HEADS + kv_head) * PAGE + place % PAGE) * DIM)[:, None]


@triton.jit
def _attend(
    qkv,
    keys,
    values,
    table,
    slots,
    positions,
    shares,
    scales,
    temperature,
    room,
    window,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: one share of the keys of one KV head, for all query heads that read it.

    With one share it writes the answer, else the share's own mean of the values and the logarithm
    of its weight. Keys beyond the row's own are masked, never read: they may be anybody's.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    stop = tl.where(slot >= 0, position + 1, 0)
    start = tl.maximum(stop - window, 0)
    blocks = tl.cdiv(stop - start, KEYS)
    share = tl.cdiv(blocks, SPLITS) * KEYS
    begin = start + split * share
    end = tl.minimum(begin + share, stop)

    per_head: tl.constexpr = HEADS // KV_HEADS
    group, columns = tl.arange(0, GROUP), tl.arange(0, BLOCK)
    in_group, in_dim = group < per_head, columns < DIM
    head = kv_head * per_head + group
    q_place = (row.to(tl.int64) * COLUMNS + head[:, None]) * DIM + columns[None, :]
    q = tl.load(qkv + q_place, mask=in_group[:, None] & in_dim[None, :], other=0.0)
    own = table + slot.to(tl.int64) * room

    most = tl.full((GROUP,), LOWEST, tl.float32)
    weight = tl.zeros((GROUP,), tl.float32)
    mean = tl.zeros((GROUP, BLOCK), tl.float32)
    for first in range(begin, end, KEYS):
        place = first + tl.arange(0, KEYS)
        seen = place < end
        offsets = _offsets(own, place, seen, kv_head, KV_HEADS, PAGE, DIM) + columns[None, :]
        inside = seen[:, None] & in_dim[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * temperature
        scores = tl.where(seen[None, :], scores, float("-inf"))
        most, weight, mean = _take_in(most, weight, mean, scores, v)

    mean = mean / tl.maximum(weight, LEAST)[:, None]
    place = (row.to(tl.int64) * HEADS + head) * SPLITS + split
    tl.store(
        shares + place[:, None] * DIM + columns[None, :],
        mean.to(shares.dtype.element_ty),
        mask=in_group[:, None] & in_dim[None, :],
    )
    if SPLITS > 1:
        tl.store(scales + place, most + tl.log(tl.maximum(weight, LEAST)), mask=in_group)


@triton.jit
def _combine(
    shares,
    scales,
    out,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a head of a row: the mean of the shares' means, by their weights."""
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, columns = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    in_dim = columns < DIM
    scale = tl.load(scales + place * SPLITS + split)
    highest = tl.max(scale)
    weight = tl.exp(scale - highest)
    parts = tl.load(
        shares + (place * SPLITS + split[:, None]) * DIM + columns[None, :],
        mask=in_dim[None, :],
        other=0.0,
    )
    mean = tl.sum(parts * weight[:, None], axis=0) / tl.maximum(tl.sum(weight), LEAST)
    tl.store(out + place * DIM + columns, mean.to(out.dtype.element_ty), mask=in_dim)


@triton.jit
def _attend_chunk(
    qkv,
    keys,
    values,
    table,
    tiles,
    out,
    temperature,
    room,
    window,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: one head of one tile, over all the keys that any query of it sees."""
    tile, head = tl.program_id(0) * 4, tl.program_id(1)
    row, alive = tl.load(tiles + tile).to(tl.int64), tl.load(tiles + tile + 1)
    slot, position = tl.load(tiles + tile + 2).to(tl.int64), tl.load(tiles + tile + 3)
    query, columns = tl.arange(0, QUERIES), tl.arange(0, BLOCK)
    in_dim = columns < DIM
    filled = (query < alive)[:, None] & in_dim[None, :]
    q_place = ((row + query[:, None]) * COLUMNS + head) * DIM + columns[None, :]
    q = tl.load(qkv + q_place, mask=filled, other=0.0)
    row_pages, kv_head = table + slot * room, head // (HEADS // KV_HEADS)
    own = position + query  # the position of each query
    stop = tl.where(slot >= 0, position + alive, 0)

    most = tl.full((QUERIES,), LOWEST, tl.float32)
    weight = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, BLOCK), tl.float32)
    for first in range(tl.maximum(position + 1 - window, 0), stop, KEYS):
        place = first + tl.arange(0, KEYS)
        there = place < stop
        offsets = _offsets(row_pages, place, there, kv_head, KV_HEADS, PAGE, DIM) + columns[None, :]
        inside = there[:, None] & in_dim[None, :]
        k = tl.load(keys + offsets, mask=inside, other=0.0)
        v = tl.load(values + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * temperature
        seen = (place[None, :] <= own[:, None]) & (place[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        most, weight, mean = _take_in(most, weight, mean, scores, v)

    mean = mean / tl.maximum(weight, LEAST)[:, None]
    o_place = ((row + query[:, None]) * HEADS + head) * DIM + columns[None, :]
    tl.store(out + o_place, mean.to(out.dtype.element_ty), mask=filled)
