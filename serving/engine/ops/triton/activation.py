"""The gated activation of the MLP."""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl

BLOCK = 1024


def silu_mul(gate_up: torch.Tensor, lora: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) · up for gate_up + lora, both [rows, 2 · size] and dense."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _silu_mul[(rows, triton.cdiv(size, BLOCK))](gate_up, lora, out, SIZE=size, BLOCK=BLOCK)
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
