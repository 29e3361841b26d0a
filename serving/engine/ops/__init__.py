"""The operators of a forward pass in plain torch: for every device, and the reference.

`native` has the same operators compiled for the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from serving.engine.ops.activation import silu_mul
from serving.engine.ops.attention import AttentionPlan, Window, attend
from serving.engine.ops.blocks import CopyBlocks, copy_blocks
from serving.engine.ops.lora import LoraPlan, Weights, apply_lora
from serving.engine.ops.norm import rms_norm
from serving.engine.ops.rope import rope
from serving.engine.ops.sampling import Shape, greedy, sample

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Operators:
    """One body for each operator; the shapes are in the docstrings of the torch bodies."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    silu_mul: Callable[[Tensor], Tensor] = silu_mul
    lora: Callable[[Tensor, Tensor, Weights, LoraPlan], None] = apply_lora
    attend: Callable[[Tensor, Tensor, Tensor, AttentionPlan, Window], Tensor] = attend
    greedy: Callable[[Tensor], tuple[Tensor, Tensor]] = greedy
    sample: Callable[[Tensor, Shape], Tensor] = sample
    copy_blocks: CopyBlocks = copy_blocks
