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
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend with the last n tokens of one sequence.

    q [n, heads, dim], keys and values [kv_heads, length, dim], the n new ones included; mask is
    that of `chunk_mask`.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)


def chunk_mask(
    n: int, length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return [n, length]: may token i of a chunk see key j? None: the chunk is all there is.

    It does when j <= length - n + i, and when key j is inside the window.
    """
    if n == length and (window is None or length <= window):
        return None
    query = torch.arange(length - n, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
