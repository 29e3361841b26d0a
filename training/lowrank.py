"""A weight difference as two small matrices, by singular value decomposition.

The first r singular triples of a matrix are its best approximation of rank r in the Frobenius
norm (Eckart and Young, 1936). With U·S·V of a difference, A = √S·V and B = U·√S; their squared
singular values, summed, are the *energy* they keep of it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The factors of one layer's difference: `b @ a` is close to it."""

    a: torch.Tensor  # [rank, in], fp32
    b: torch.Tensor  # [out, rank], fp32
    kept: float  # squared Frobenius norm of b @ a
    energy: float  # squared Frobenius norm of the difference itself

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def factorise(delta: torch.Tensor, rank: int, energy: float = 1.0) -> LowRank:
    """Factorise a difference [out, in] at the smallest rank that keeps the share `energy` of it.

    Never above `rank`, nor above the matrix's own sides.
    """
    u, s, v = torch.linalg.svd(delta.float(), full_matrices=False)
    sums = s.double().square().cumsum(0)
    needed = int((sums < energy * sums[-1]).sum()) + 1
    rank = min(rank, needed, len(s))
    root = s[:rank].sqrt()
    kept, total = float(sums[rank - 1]), float(sums[-1])
    return LowRank((root[:, None] * v[:rank]).contiguous(), u[:, :rank] * root, kept, total)


def relative_error(factors: Iterable[LowRank]) -> float:
    """Return ‖ΔW − BA‖ / ‖ΔW‖ over all layers together; 0 where nothing was changed."""
    parts = list(factors)
    energy = math.fsum(part.energy for part in parts)
    lost = energy - math.fsum(part.kept for part in parts)
    return math.sqrt(max(lost, 0.0) / energy) if energy else 0.0


def lora_tensors(factors: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that PEFT gives to a LoRA's."""
    tensors: dict[str, torch.Tensor] = {}
    for module, part in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = part.a
        tensors[f"base_model.model.{module}.lora_B.weight"] = part.b
    return tensors
