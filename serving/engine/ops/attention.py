"""Attention over the slotted cache: one token of many sequences, or many tokens of one."""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention


def decode_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
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
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask).reshape(q.shape)


def chunk_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Attend with the last n tokens of one sequence.

    q [n, heads, dim], keys and values [kv_heads, length, dim], the n new ones included. Token i of
    the chunk sees key j when j <= length - n + i, and when it is inside the window.
    """
    n, length = q.shape[0], keys.shape[1]
    whole = n == length and (window is None or length <= window)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=None if whole else _seen(n, length, window, q.device),
        is_causal=whole,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)


def _seen(n: int, length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [n, length]: may query i of the chunk see key j?"""
    query = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
