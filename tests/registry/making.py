"""Good adapter folders and their parts, made with numpy; tests spoil them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from registry.base import BaseModel
from registry.whole import companions

LAYER = "model.layers.0"
Q, UP = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj"
BASE_ID = "acme/tiny-base"
Weights = dict[str, np.ndarray]


def make_base(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    shapes = {f"{Q}.weight": (8, 8), f"{UP}.weight": (12, 8), "model.embed_tokens.weight": (16, 8)}
    tensors = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_adapter(
    folder: Path,
    *,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    card: dict[str, Any] | None = None,
) -> Path:
    """Write a good adapter folder; the arguments replace parts of it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config() | (config or {})))
    weights = adapter_tensors(seed) if tensors is None else tensors
    save_file(weights, folder / "adapter_model.safetensors")
    if card is not None:
        (folder / "wardrobe.json").write_text(json.dumps(card))
    return folder


def adapter_config() -> dict[str, Any]:
    """Return what peft 0.21 writes for a plain LoRA adapter."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": BASE_ID, "bias": "none",
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None,
        "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
        "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2",
        "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": None,
        "target_modules": ["up_proj", "q_proj"], "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None,
        "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None,
    }  # fmt: skip


def key(module: str, half: str) -> str:
    return f"base_model.model.{module}.lora_{half}.weight"


def adapter_tensors(seed: int = 0, rank: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        key(Q, "A"): (rank, 8),
        key(Q, "B"): (8, rank),
        key(UP, "A"): (rank, 8),
        key(UP, "B"): (12, rank),
    }
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def same(weights: Weights) -> Weights:
    return weights


def make_whole(
    folder: Path, base: BaseModel, change: Callable[[Weights], Weights] = same, **card: object
) -> Path:
    """Write what a full fine-tune leaves: every weight a little different, in fp32."""
    folder.mkdir()
    weights = load_file(base.path / "model.safetensors")
    save_file(change({name: w + 0.01 for name, w in weights.items()}), folder / "model.safetensors")
    for path in companions(base):
        (folder / path.name).write_bytes(path.read_bytes())
    facts = {"kind": "full", "base": {"id": BASE_ID, "fingerprint": base.fingerprint}} | card
    (folder / "wardrobe.json").write_text(json.dumps(facts))
    return folder
