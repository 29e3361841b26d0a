"""Write an adapter so that equal weights are equal bytes, and nothing of this machine is in it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from training.lowrank import LowRank, lora_tensors


@dataclass(frozen=True, slots=True, eq=False)
class PlainLora:
    """An adapter that fits the untouched base: its tensors, and what LoraConfig must say."""

    weights: Mapping[str, torch.Tensor]  # under PEFT's names
    r: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of_factors(cls, factors: Mapping[str, LowRank]) -> "PlainLora":
        """Make an adapter of module → factors; alpha is the rank everywhere, so the scale is 1."""
        r = max(part.rank for part in factors.values())
        smaller = {module: part.rank for module, part in factors.items() if part.rank != r}
        targets = tuple(sorted(factors))
        return cls(
            lora_tensors(factors), r, r, targets, rank_pattern=smaller, alpha_pattern=dict(smaller)
        )


def write_lora(lora: PlainLora, base_id: str, folder: Path) -> None:
    """Write weights in fp32, and a config with the fields that differ or that readers ask for.

    The base is its logical id: PEFT itself writes the path it was loaded from.
    """
    config = {
        "alpha_pattern": dict(lora.alpha_pattern),
        "base_model_name_or_path": base_id,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": dict(lora.rank_pattern),
        "target_modules": sorted(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.use_rslora,
    }
    _write(lora.weights, config, folder)


def write_as_peft(model: Any, base_id: str, folder: Path) -> None:
    """Write what is no LoRA as PEFT itself would, but for the base's path."""
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    lists = {key: sorted(value) for key, value in config.items() if isinstance(value, set)}
    _write(get_peft_model_state_dict(model), config | lists, folder)


def _write(state: Mapping[str, torch.Tensor], config: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: state[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(state)
    }
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
