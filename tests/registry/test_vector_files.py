"""The gate for what adapters have beside LoRA: every vector fits its place, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from registry.base import Bases
from registry.errors import Refused
from registry.validate import validate
from tests import tiny
from tests.peft_cases import BASE_ID, CASES, Case, lora, make, other

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYER = "base_model.model.model.layers.0"
Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Tensors, dict[str, Any]], object]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("bases")
    bases = Bases(folder / "bases")
    tiny.register(tiny.make_base(folder / "tiny"), bases, BASE_ID)
    return bases


def spoiled(title: str, spoil: Spoil, bases: Bases, folder: Path) -> Path:
    [case] = [case for case in CASES if case.title == title]
    make(case, bases.get(BASE_ID).path, folder)
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": BASE_ID}
    (folder / CONFIG).write_text(json.dumps(config))
    validate(folder, bases)  # it was good
    spoil(tensors, config)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def put(name: str, *shape: int) -> Spoil:
    return lambda tensors, _: tensors.__setitem__(name, torch.ones(shape))


def field(name: str, value: object) -> Spoil:
    return lambda _, config: config.__setitem__(name, value)


def tokens_too(name: str, indices: object) -> Spoil:
    def spoil(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[name] = torch.ones(1, 64)
        config["trainable_token_indices"] = indices

    return spoil


DTYPE = "dtype_unsupported"
DORA, IA3, NORMS = "DoRA", "IA3", "`modules_to_save` of norms"
TOKENS, PROMPT, PREFIX = "`trainable_token_indices`", "Prompt tuning", "Prefix tuning"
SAVED = "`modules_to_save` of embedding, head and norms"
HEAD_ONLY = "`modules_to_save` of the head"
EMBEDDING, HEAD = (f"base_model.model.{module}" for module in ("model.embed_tokens", "lm_head"))
Q = f"{LAYER}.self_attn.q_proj"
DELTA = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
HEAD_DELTA = f"{HEAD}.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("title", "spoil", "code"),
    [
        (DORA, lambda t, _: t.pop(f"{Q}.lora_magnitude_vector"), "orphan"),
        (DORA, put(f"{Q}.lora_magnitude_vector", 63), "shape_mismatch"),
        (DORA, field("use_dora", False), "unknown_key"),
        (DORA, put(f"{Q}.lora_B.bias", 64), "unknown_key"),
        (DORA, put("base_model.model.lm_head.lora_magnitude_vector", 258), "orphan"),
        ("`lora_bias`", lambda t, _: t.pop(f"{Q}.lora_B.bias"), "orphan"),
        ('`bias="all"`', put(f"{Q}.base_layer.bias", 64), "module_not_in_base"),
        (NORMS, put(f"{LAYER}.input_layernorm.weight", 32), "shape_mismatch"),
        (NORMS, put(f"{LAYER}.surprise_input_layernorm.weight", 64), "module_not_in_base"),
        (NORMS, put(f"{LAYER}.surprise.weight", 64), "unknown_key"),
        (NORMS, put(f"{EMBEDDING}.weight", 258, 64), "unknown_key"),
        (NORMS, field("modules_to_save", None), "unknown_key"),
        (SAVED, put(f"{EMBEDDING}.weight", 257, 64), "shape_mismatch"),
        (SAVED, put(f"{EMBEDDING}.weight", 260, 64), "shape_mismatch"),
        (SAVED, put(f"{EMBEDDING}.weight", 258, 63), "shape_mismatch"),
        (SAVED, put(f"{HEAD}.weight", 258), "shape_mismatch"),
        (SAVED, put(f"{HEAD}.weight", 258, 64, 1), "shape_mismatch"),
        (SAVED, put(f"{HEAD}.weight", 0, 64), "shape_mismatch"),
        (SAVED, lambda t, _: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].double()}), DTYPE),
        (SAVED, lambda t, _: t.update({f"{HEAD}.weight": t[f"{HEAD}.weight"].byte()}), DTYPE),
        (SAVED, lambda t, _: t[f"{EMBEDDING}.weight"][257, 63].fill_(torch.nan), "non_finite"),
        (SAVED, lambda t, _: t[f"{HEAD}.weight"][0, 0].fill_(torch.inf), "non_finite"),
        (SAVED, lambda t, _: t.pop(f"{HEAD}.weight"), "tensor_missing"),
        (SAVED, put(f"{HEAD}.modules_to_save.weight", 258, 64), "unknown_key"),
        (SAVED, put(f"model.{HEAD}.weight", 258, 64), "unknown_key"),
        (SAVED, put(f"{HEAD}.bias", 258), "part_unsupported"),
        (SAVED, field("modules_to_save", ["embed_tokens", "norm"]), "unknown_key"),
        (SAVED, tokens_too(DELTA, {"embed_tokens": [1]}), "config_invalid"),
        (SAVED, tokens_too(HEAD_DELTA, {"lm_head": [1]}), "config_invalid"),
        (HEAD_ONLY, tokens_too(DELTA, [1]), "config_invalid"),  # the head is the embedding
        (TOKENS, put(DELTA, 2, 64), "shape_mismatch"),
        (TOKENS, put(DELTA.replace("model.embed", "other.embed"), 33, 64), "unknown_key"),
        (TOKENS, put(DELTA, 33, 32), "shape_mismatch"),
        (TOKENS, field("trainable_token_indices", [0, 258]), "config_invalid"),
        (TOKENS, field("trainable_token_indices", [1, 1]), "config_invalid"),
        (TOKENS, field("trainable_token_indices", {"lm_head": [1]}), "unknown_key"),
        (TOKENS, field("trainable_token_indices", {"other": [1]}), "config_invalid"),
        (TOKENS, field("trainable_token_indices", [True]), "config_invalid"),
        (IA3, put(f"{LAYER}.self_attn.k_proj.ia3_l", 64, 1), "shape_mismatch"),
        (IA3, put(f"{LAYER}.self_attn.k_proj.ia3_l", 1, 64), "part_unsupported"),
        (IA3, put(f"{LAYER}.self_attn.z_proj.ia3_l", 64, 1), "module_not_in_base"),
        (IA3, put(f"{Q}.lora_A.weight", 4, 64), "unknown_key"),
        (IA3, field("surprise", 1), "config_unknown_field"),
        (IA3, field("auto_mapping", {"parent_library": "os"}), "config_invalid"),
        ("BEFT", put(f"{LAYER}.self_attn.v_proj.beft_bias", 32), "shape_mismatch"),
        (PROMPT, put("prompt_embeddings", 5, 63), "shape_mismatch"),
        (PROMPT, put("prompt_embeddings", 64), "shape_mismatch"),
        (PROMPT, put("prompt_embeddings", 1025, 64), "too_large"),
        (PROMPT, put("prompt_embeddings", 0, 64), "too_large"),
        (PROMPT, put("prompt_embedding", 1, 64), "unknown_key"),
        (PROMPT, field("num_transformer_submodules", 2), "config_invalid"),
        (PREFIX, put("prompt_embeddings", 6, 64), "shape_mismatch"),
        (PREFIX, lambda t, _: t["prompt_embeddings"].fill_(torch.nan), "non_finite"),
        (PREFIX, field("peft_type", "PROMPT_TUNING"), "config_unknown_field"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(
    title: str, spoil: Spoil, code: str, bases: Bases, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as refusal:
        validate(spoiled(title, spoil, bases, tmp_path), bases)
    assert code in {found for found, _ in refusal.value.problems}


DOWN = ["down_proj"]


@pytest.mark.parametrize(
    ("arch", "config", "words"),
    [
        ("phi3", other("PrefixTuningConfig", num_virtual_tokens=2), "come from no k_proj and v"),
        (
            "phi3",
            other("IA3Config", target_modules=DOWN, feedforward_modules=DOWN),
            "scaled inputs are served for",
        ),
        ("phi", lora(target_modules=["fc1"], modules_to_save=["lm_head"]), "a head with a bias"),
        ("phi", lora(target_modules=["fc1"], bias="all"), "vectors of the output head are not"),
        ("gpt2", lora(target_modules=["c_fc"], modules_to_save=["lm_head"]), "bases of 'gpt2'"),
        ("gpt2", lora(target_modules=["c_fc"], modules_to_save=["wte"]), "other matrices are not"),
        ("opt", lora(target_modules=["fc1"], trainable_token_indices=[1]), "bases of 'opt'"),
        ("gpt_neox", lora(target_modules=["dense"], modules_to_save=["embed_in"]), "other matr"),
        (
            "qwen3_moe",
            lora(target_modules=["q_proj"], modules_to_save=["q_norm"]),
            "other matrices are not",
        ),
    ],
)
def test_what_a_base_that_transformers_computes_cannot_wear_is_refused_with_the_reason(
    arch: str, config: Callable[[], PeftConfig], words: str, tmp_path: Path
) -> None:
    bases = Bases(tmp_path / "bases")
    tiny.register(tiny.make_base(tmp_path / "tiny", arch=arch), bases, BASE_ID)
    folder = make(Case("", "refused", "", config), bases.get(BASE_ID).path, tmp_path / "adapter")
    with pytest.raises(Refused, match=words):
        validate(folder, bases, base=BASE_ID)
