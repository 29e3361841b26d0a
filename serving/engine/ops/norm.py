"""Root mean square normalisation (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension of x, then scale by weight of that size."""
    return F.rms_norm(x, weight.shape, weight, eps)
