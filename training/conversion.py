"""From what was trained to a plain LoRA over the untouched base, which is what can be served.

PiSSA and OLoRA took a part out of the base's weights at the start and gave it to A and B. What
they learned is the difference to that start, `BA - B0 A0`: a LoRA of twice the rank, exactly.
DoRA, LoHa and LoKr change the weights in forms of their own; the change itself is factorised, as
well as `max_rank` allows, and what that loses is measured.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from training.adapter_files import PlainLora
from training.lowrank import factorise, relative_error
from training.recipe import Method

ENERGY = 0.999  # share of a layer's change that its factors are to keep: an error of 0.03
MAX_ERROR = 0.2  # relative, of all layers: above it another adapter is served than was trained

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What the factors of the trained change lost of it."""

    relative_error: float  # ‖ΔW − BA‖ / ‖ΔW‖ over all layers
    highest_rank: int

    @property
    def failures(self) -> list[str]:
        """Return why the converted adapter must not pass for the trained one."""
        if self.relative_error <= MAX_ERROR:
            return []
        return [
            f"The adapter is a LoRA of rank {self.highest_rank} made from what was trained, with a "
            f"relative error of {self.relative_error:.3f}, above {MAX_ERROR:g}. Raise "
            "method.max_rank, or train method.kind = 'lora'."
        ]


def starting_weights(model: Any, method: Method) -> Weights:
    """Return A and B before the first step where the base was changed to fit them."""
    if method.kind not in ("pissa", "olora"):
        return {}
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def plain_lora(model: Any, method: Method, start: Weights) -> tuple[PlainLora, Conversion | None]:
    """Return the trained PEFT model as a plain LoRA, and how well where it is not exactly that."""
    if method.kind in ("dora", "loha", "lokr"):
        with torch.no_grad():
            factors = {
                module: factorise(delta, method.max_rank, ENERGY)
                for module, delta in _differences(model)
            }
        lora = PlainLora.of_factors(factors)
        return lora, Conversion(relative_error(factors.values()), lora.r)
    config, weights = model.peft_config["default"], get_peft_model_state_dict(model)
    doubled = 2 if start else 1
    lora = PlainLora(
        {name: _stacked(name, value, start) for name, value in weights.items()},
        r=doubled * config.r,
        alpha=doubled * config.lora_alpha,
        targets=tuple(config.target_modules),
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    return lora, None


def _stacked(name: str, trained: torch.Tensor, start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return `[A; A0]` or `[B, -B0]`: their product is BA - B0 A0."""
    if name not in start:
        return trained
    if ".lora_A." in name:
        return torch.cat([trained, start[name]])
    return torch.cat([trained, -start[name]], dim=1)


def _differences(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield module name and weight difference [out, in], in fp32, of every adapted layer."""
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        delta: torch.Tensor = layer.get_delta_weight("default").float()  # type: ignore[operator]  # every layer of these kinds has it
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if "default" in magnitudes:
            # DoRA (arXiv 2402.09353, equation 5): every row is scaled to its trained length.
            weight: torch.Tensor = layer.get_base_layer().weight.float()  # type: ignore[union-attr]  # a linear
            length = (weight + delta).norm(dim=1)
            scaled = (magnitudes["default"].weight.float() / length)[:, None] * (weight + delta)
            delta = scaled - weight
        yield name.removeprefix("base_model.model."), delta
