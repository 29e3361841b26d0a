"""Rotary position embedding (arXiv 2104.09864), in the half-split layout of Hugging Face."""

import torch


def rope_angles(
    inverse_frequencies: torch.Tensor, length: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of every position times `scale`, float32 [length, head_dim / 2]."""
    positions = torch.arange(length, dtype=torch.float32, device=inverse_frequencies.device)
    angles = torch.outer(positions, inverse_frequencies)
    return angles.cos() * scale, angles.sin() * scale


def rope_tables(
    inverse_frequencies: torch.Tensor, length: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of shape [length, 1, head_dim], sin with the rotation's sign in it."""
    cos, sin = rope_angles(inverse_frequencies, length, scale)
    signed = torch.cat((-sin, sin), dim=-1)
    return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), signed[:, None].to(dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x of shape [tokens, heads, head_dim]; cos and sin are rows of `rope_tables`."""
    return x * cos + torch.roll(x, x.shape[-1] // 2, -1) * sin
