"""The gated activation of the MLP.

Its input is the widest of all activations. So where many rows wear adapters, what these add is
computed here, in the place where it is used, and neither written nor read.
"""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from serving.engine.ops.triton.lora import (
    SHARES,
    Arena,
    LoraTiles,
    alive,
    product,
    shrink,
    tile,
)

BLOCK = 1024
REGISTERS = 128  # of a thread: two programs of 8 warps share a multiprocessor


def silu_mul(gate_up: torch.Tensor, lora: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) · up for gate_up + lora, both [rows, 2 · size] and dense."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, BLOCK))](gate_up, lora, out, SIZE=size, BLOCK=BLOCK)
    return out


def adapted_silu_mul(
    gate_up: torch.Tensor, x: torch.Tensor, tiles: LoraTiles, arena: Arena, group: str, layer: int
) -> torch.Tensor:
    """Return silu(gate) · up for gate_up + B(A(x)) of every row's own adapter; see `lora`."""
    rows, size, count = len(x), gate_up.shape[1] // 2, len(tiles.table)
    shares, shrunk = SHARES[tiles.height], shrink(x, tiles, arena, group, layer)
    out = gate_up.new_empty(rows, size)
    _adapted[(triton.cdiv(size, shares.outputs), min(shares.walkers, count))](
        *(gate_up, out, shrunk, tiles.table, arena.memory, layer, rows, count),
        UNIT=arena.unit,
        START=arena.places[group].b,
        LAYERS=arena.layers,
        SIZE=size,
        MOST=shrunk.shape[2],
        HEIGHT=tiles.height,
        BLOCK=shares.outputs,
        SPLITS=len(shrunk),
        num_stages=shares.stages[1],
        num_warps=shares.warps,
        maxnreg=REGISTERS,
    )
    return out


@triton.jit
def _silu_mul(gate_up, lora, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    place = row * 2 * SIZE + columns
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + SIZE, mask=inside, other=0.0).to(tl.float32)
    if lora is not None:
        gate += tl.load(lora + place, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(lora + place + SIZE, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * SIZE + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "rows", "count"])
def _adapted(
    gate_up,
    out,
    shrunk,
    tiles,
    arena,
    layer,
    rows,
    count,
    UNIT: tl.constexpr,
    START: tl.constexpr,
    LAYERS: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One block of columns of the gate and the same of what goes through it, for some tiles."""
    column, t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    while alive(tiles, t, count) > 0:
        rank, slot, row, live = tile(tiles, t, HEIGHT)
        wanted = live[:, None] & (column < SIZE)[None, :]
        place = row[:, None] * (2 * SIZE) + column[None, :]
        gate = tl.load(gate_up + place, mask=wanted, other=0.0).to(tl.float32)
        numbers = slot.to(tl.int64) * UNIT + START + layer * SIZE
        b = arena + rank.to(tl.int64) * numbers
        gate += product(
            shrunk, rank, 0, row, live, rows, b, SIZE, column, MOST, HEIGHT, BLOCK, SPLITS
        )
        value = gate * tl.sigmoid(gate)
        up = tl.load(gate_up + place + SIZE, mask=wanted, other=0.0).to(tl.float32)
        b += rank.to(tl.int64) * (LAYERS * SIZE)
        up += product(
            shrunk, rank, 1, row, live, rows, b, SIZE, column, MOST, HEIGHT, BLOCK, SPLITS
        )
        value *= up
        tl.store(
            out + row[:, None] * SIZE + column[None, :], value.to(out.dtype.element_ty), mask=wanted
        )
        t += tl.num_programs(1)
