"""Write an adapter so that equal weights are equal bytes, and nothing of this machine is in it."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from training.recipe import Method

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter(model: Any, method: Method, base_id: str, folder: Path) -> None:
    """Write the trained LoRA of a PEFT model: weights in fp32, a config of what it needs."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    weights = {
        name: state[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(state)
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = adapter_config(method, base_id, sorted(model.peft_config["default"].target_modules))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def adapter_config(method: Method, base_id: str, targets: list[str]) -> dict[str, Any]:
    """Return the fields of LoraConfig that differ or that readers ask for; PEFT knows the rest.

    The base is its logical id: PEFT itself writes the path it was loaded from.
    """
    return {
        "base_model_name_or_path": base_id,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": method.alpha,
        "lora_dropout": method.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": method.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": method.kind == "rslora",
    }
