"""Root mean square normalisation (arXiv 1910.07467), with the residual sum that feeds it."""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl

from serving.engine.ops.triton.vectors import RowNorms


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, own: RowNorms | None = None
) -> torch.Tensor:
    """Return x [rows, size] normalised and scaled by weight [size]; x lies dense.

    A row that has a weight of its `own` is scaled by that.
    """
    return _launch(x, None, None, weight, eps, own)


def add_rms_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    lora: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    own: RowNorms | None = None,
) -> torch.Tensor:
    """Add delta and lora to x in place, then return what `rms_norm` does; all [rows, size]."""
    return _launch(x, delta, lora, weight, eps, own)


def _launch(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    lora: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    own: RowNorms | None,
) -> torch.Tensor:
    rows, size = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    arena, places, number = (own.arena, own.places, own.number) if own else (None, None, 0)
    _norm[(rows,)](
        *(x, delta, lora, weight, arena, places, number, out, eps), SIZE=size, BLOCK=block
    )
    return out


@triton.jit(do_not_specialize=["number"])
def _norm(
    x,
    delta,
    lora,
    weight,
    arena,
    places,
    number,
    out,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. The sum is rounded before it is normalised, as it is when stored."""
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    place = tl.program_id(0).to(tl.int64) * SIZE + columns
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        if lora is not None:
            value += tl.load(lora + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / SIZE + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if places is not None:
        own = tl.load(places + tl.program_id(0))
        if own >= 0:
            gain = tl.load(arena + own + number * SIZE + columns, mask=inside, other=0.0).to(
                tl.float32
            )
    tl.store(out + place, (value * scale * gain).to(out.dtype.element_ty), mask=inside)
