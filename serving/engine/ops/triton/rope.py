"""What lies between the qkv linear and attention: head norms, rotation, the write to the cache."""

# A kernel is called with numbers and options that its signature, for the compiler, does not say.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl

from serving.engine.kv_pages import LayerPages


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    pages: LayerPages,
    lora: torch.Tensor | None = None,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Add lora to qkv, rotate its queries in place, put rotated keys and values into the cache.

    qkv and lora [rows, heads + 2 · kv_heads, dim], dense; cos and sin float32 [length, dim / 2];
    slots and positions int32 [rows]. A row of slot -1 is dead and writes nothing to the cache.
    `norms` are the weights of Qwen3's query and key norms.
    """
    rows, columns, dim = qkv.shape
    _, kv_heads, size, _ = pages.keys.shape
    query_norm, key_norm = norms or (None, None)
    _rotate_and_store[(rows, columns)](
        qkv,
        cos,
        sin,
        slots,
        positions,
        pages.keys,
        pages.values,
        pages.table,
        lora,
        query_norm,
        key_norm,
        eps,
        pages.table.shape[1],
        HEADS=columns - 2 * kv_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim // 2),
        PAGE=size,
        NORM=norms is not None,
    )


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    slots,
    positions,
    keys,
    values,
    table,
    lora,
    query_norm,
    key_norm,
    eps,
    room,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    NORM: tl.constexpr,
):
    """One program a head of a row; a head is two halves that rotate into each other."""
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = DIM // 2
    low = tl.arange(0, BLOCK)
    inside = low < half
    own = (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * DIM + low
    source = qkv + own
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if lora is not None:
        first += tl.load(lora + own, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(lora + own + half, mask=inside, other=0.0).to(tl.float32)
    slot, position = tl.load(slots + row), tl.load(positions + row)
    if head < HEADS + KV_HEADS:
        if NORM:
            scale = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / DIM + eps)
            gain = query_norm if head < HEADS else key_norm
            first *= scale * tl.load(gain + low, mask=inside, other=0.0).to(tl.float32)
            second *= scale * tl.load(gain + half + low, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + position * half + low, mask=inside, other=0.0)
        s = tl.load(sin + position * half + low, mask=inside, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    kind = qkv.dtype.element_ty
    if head < HEADS:
        tl.store(source, first.to(kind), mask=inside)
        tl.store(source + half, second.to(kind), mask=inside)
    else:
        kv_head = (head - HEADS) % KV_HEADS
        entry = table + slot.to(tl.int64) * room + position // PAGE
        page = tl.load(entry, mask=slot >= 0, other=0).to(tl.int64)
        place = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * DIM + low
        alive = inside & (slot >= 0)
        cache = keys if head < HEADS + KV_HEADS else values
        tl.store(cache + place, first.to(kind), mask=alive)
        tl.store(cache + place + half, second.to(kind), mask=alive)
