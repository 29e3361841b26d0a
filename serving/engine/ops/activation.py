"""The gated activation of the MLP."""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) · up for gate_up of shape [tokens, 2 · intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
