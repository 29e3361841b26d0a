"""The operators of a forward pass. Each has a plain torch body that serves as its reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.engine.ops.activation import silu_mul
from serving.engine.ops.attention import chunk_attention, decode_attention
from serving.engine.ops.lora import LoraPlan, Weights, apply_lora
from serving.engine.ops.norm import rms_norm
from serving.engine.ops.rope import rope
from serving.engine.ops.sampling import argmax

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Operators:
    """One body for each operator; the shapes are in the docstrings of the torch bodies."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    silu_mul: Callable[[Tensor], Tensor] = silu_mul
    lora: Callable[[Tensor, Tensor, Weights, LoraPlan], None] = apply_lora
    decode_attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = decode_attention
    chunk_attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = chunk_attention
    argmax: Callable[[Tensor], Tensor] = argmax


def operators_for(device: torch.device) -> Operators:  # noqa: ARG001  # bodies differ by device
    """Choose the bodies for a device. The only place where that is decided."""
    return Operators()
