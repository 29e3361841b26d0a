"""Attention over the slotted cache: one token of many sequences, or many tokens of one.

`plan_attention` makes what is the same for all layers: how the queries lie beside the slots, and
who sees whom.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

from serving.engine.batch import Batch, Chunk

LENGTH_STEP = 32  # attention reads a multiple of this many positions, so few shapes occur

Window = int | None


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The first `count` rows: one token each, of different sequences."""

    count: int
    slots: slice | torch.Tensor  # KV slots that attention reads, holes included
    length: int  # positions of a slot that attention reads
    spread: torch.Tensor | None  # row for each of those slots; None: the rows are in slot order
    gather: torch.Tensor | None  # where each row is among those slots
    biases: dict[Window, torch.Tensor]  # window → [slots, 1, 1, length], 0 or -inf


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Who attends to what in one step; chunks go with their masks by window."""

    decode: DecodeRows | None
    chunks: tuple[tuple[Chunk, dict[Window, torch.Tensor | None]], ...]


def plan_attention(
    batch: Batch, windows: Iterable[Window], length: int, dtype: torch.dtype, device: torch.device
) -> AttentionPlan:
    """Plan a step over slots of `length` positions, for layers with these windows."""
    kinds = frozenset(windows)
    decode = None
    if batch.singles:
        # CUDA wants the type of the queries; on the CPU float32 is the faster mask.
        dtype = torch.float32 if device.type == "cpu" else dtype
        slots, positions = batch.slots[: batch.singles], batch.positions[: batch.singles]
        decode = _decode_rows(slots.tolist(), positions.tolist(), kinds, length, dtype, device)
    return AttentionPlan(decode, tuple((c, _masks(c, kinds, device)) for c in batch.chunks))


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    window: Window,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return [tokens, heads, dim] for q of that shape, over one layer's keys and values.

    `softcap` bends every score s to softcap · tanh(s / softcap), as Gemma 2 does (arXiv
    2408.00118).
    """
    parts: list[torch.Tensor] = []
    if plan.decode is not None:
        rows = q[: plan.decode.count]
        parts.append(_decode(rows, keys, values, plan.decode, window, softcap))
    for chunk, masks in plan.chunks:
        end = chunk.position + chunk.stop - chunk.start
        seen_keys, seen_values = keys[chunk.slot, :, :end], values[chunk.slot, :, :end]
        rows = q[chunk.start : chunk.stop]
        parts.append(chunk_attention(rows, seen_keys, seen_values, masks[window], softcap))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: DecodeRows,
    window: Window,
    softcap: float | None,
) -> torch.Tensor:
    """Lay the queries out by KV slot, so that the cache is read in place."""
    keys, values = keys[rows.slots, :, : rows.length], values[rows.slots, :, : rows.length]
    spread = q.contiguous() if rows.spread is None else q[rows.spread]
    out = decode_attention(spread, keys, values, rows.biases[window], softcap)
    return out if rows.gather is None else out[rows.gather]


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend with one query of each sequence.

    q [n, heads, dim], keys and values [n, kv_heads, length, dim], bias [n, 1, 1, length] with
    -inf where a key is not seen. Returns [n, heads, dim]. The query heads that share a KV head
    are the rows of one product, so no key is copied.
    """
    n, heads, dim = q.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    rows = q.view(n, kv_heads, heads // kv_heads, dim)
    mask = bias.expand(n, 1, heads // kv_heads, length)
    if softcap is not None:
        return _capped(rows, keys, values, mask, softcap).reshape(q.shape)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(q.shape)


def chunk_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend with the last n tokens of one sequence.

    q [n, heads, dim], keys and values [kv_heads, length, dim], the n new ones included; mask is
    that of `chunk_mask`.
    """
    if softcap is not None:
        n, heads, dim = q.shape
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril() if mask is None else mask
        bias = torch.zeros(seen.shape, device=q.device).masked_fill_(~seen, -torch.inf)
        grouped = q.transpose(0, 1).view(len(keys), -1, n, dim)
        capped = _capped(grouped, keys[:, None], values[:, None], bias, softcap)
        return capped.view(heads, n, dim).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)


def _capped(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    softcap: float,
) -> torch.Tensor:
    """Attend with bent scores; q [..., rows, dim], keys [..., length, dim], bias: 0 or -inf."""
    scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    bent = softcap * torch.tanh(scores / softcap) + bias
    return torch.softmax(bent, dim=-1, dtype=torch.float32).to(values.dtype) @ values


def chunk_mask(n: int, length: int, window: Window, device: torch.device) -> torch.Tensor | None:
    """Return [n, length]: may token i of a chunk see key j? None: the chunk is all there is.

    It does when j <= length - n + i, and when key j is inside the window.
    """
    if n == length and (window is None or length <= window):
        return None
    query = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def _masks(
    chunk: Chunk, windows: Iterable[Window], device: torch.device
) -> dict[Window, torch.Tensor | None]:
    n = chunk.stop - chunk.start
    return {window: chunk_mask(n, chunk.position + n, window, device) for window in windows}


def _decode_rows(
    slots: Sequence[int],
    positions: Sequence[int],
    windows: Iterable[Window],
    most: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DecodeRows:
    low, high = min(slots), max(slots) + 1
    dense = high - low <= 2 * len(slots)
    order = [slot - low for slot in slots] if dense else list(range(len(slots)))
    span = high - low if dense else len(slots)
    spread = [0] * span  # a hole reads row 0's query; nobody reads its answer
    for row, place in enumerate(order):
        spread[place] = row
    in_order = order == list(range(span))
    length = min(most, -(-(max(positions) + 1) // LENGTH_STEP) * LENGTH_STEP)
    last = torch.tensor([positions[row] for row in spread], device=device)
    return DecodeRows(
        count=len(slots),
        slots=slice(low, high) if dense else torch.tensor(slots, device=device),
        length=length,
        spread=None if in_order else torch.tensor(spread, device=device),
        gather=None if in_order else torch.tensor(order, device=device),
        biases={window: _bias(last, length, window, dtype) for window in windows},
    )


def _bias(last: torch.Tensor, length: int, window: Window, dtype: torch.dtype) -> torch.Tensor:
    """Return [n, 1, 1, length]: 0 where position `last` sees a key, -inf elsewhere."""
    keys = torch.arange(length, device=last.device)[None]
    seen = keys <= last[:, None]
    if window is not None:
        seen &= keys > last[:, None] - window
    zeros = torch.zeros(seen.shape, dtype=dtype, device=last.device)
    return zeros.masked_fill_(~seen, -torch.inf)[:, None, None]
