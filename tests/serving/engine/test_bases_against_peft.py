"""Every architecture: a mixed batch gives what PEFT gives one request at a time."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from registry.architectures import LLAMA_FAMILY, THROUGH_TRANSFORMERS
from registry.base import Bases
from registry.validate import validate
from serving.engine.boundary import EngineUnavailable
from serving.engine.build import read_model
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.serving.engine.driving import Folders, Oracle, base_of, mixed_requests, request, run_all

BOUND = 1e-4
LENGTH = 8
# Prompts are read in chunks of at most this many tokens, beside rows that decode.
SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_model_len=96, max_running=6, max_batched_tokens=11
)

# The linears of an architecture that are not named as Llama's are. Experts are no linears.
LINEARS: dict[str, Sequence[str]] = {
    "apertus": (*tiny.ATTENTION, "up_proj", "down_proj"),
    "arcee": (*tiny.ATTENTION, "up_proj", "down_proj"),
    "ernie4_5_moe": tiny.ATTENTION,
    "exaone_moe": tiny.ATTENTION,
    "flex_olmo": tiny.ATTENTION,
    "glm": (*tiny.ATTENTION, "gate_up_proj", "down_proj"),
    "glm4": (*tiny.ATTENTION, "gate_up_proj", "down_proj"),
    "glm4_moe": tiny.ATTENTION,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_bigcode": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "granitemoe": tiny.ATTENTION,
    "jais2": (*tiny.ATTENTION, "up_proj", "down_proj"),
    "minimax_m2": tiny.ATTENTION,
    "mixtral": tiny.ATTENTION,
    "nanochat": (*tiny.ATTENTION, "fc1", "fc2"),
    "olmoe": tiny.ATTENTION,
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2_moe": tiny.ATTENTION,
    "qwen3_moe": tiny.ATTENTION,
    "solar_open": tiny.ATTENTION,
    "starcoder2": (*tiny.ATTENTION, "c_fc", "c_proj"),
}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | fields}


LONG = rope(
    "longrope",
    short_factor=[1.1] * 8,
    long_factor=[3.0] * 8,
    original_max_position_embeddings=96,
    factor=4.0,
)
LLAMA3 = rope(
    "llama3",
    rope_theta=50000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
# Queries grow with the logarithm of their position beyond the original context.
LATER = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    max_position_embeddings=64,
    llama_4_scaling_beta=0.3,
)
OWN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    ("llama", rope("linear", factor=4.0)),
    ("llama", rope("dynamic", factor=4.0)),
    ("llama", LLAMA3),
    ("llama", LONG),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    ("qwen3", {"head_dim": 32, "attention_bias": True}),
    ("qwen3", {"tie_word_embeddings": False, **SLIDING, "use_sliding_window": True}),
]
MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
THROUGH: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", SLIDING | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40}),
    ("gemma3_text", SLIDING),
    ("gemma3_text", SLIDING | {"query_pre_attn_scalar": 40, "final_logit_softcapping": 5.0}),
    ("gpt2", {}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    ("opt", {}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("phi3", {}),
    ("phi3", {"sliding_window": 9, "partial_rotary_factor": 0.5}),
    ("qwen3_moe", EXPERTS | {"use_sliding_window": True, "sliding_window": 9}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
]
ALSO: list[tuple[str, dict[str, Any]]] = [
    ("apertus", {}),
    ("arcee", {}),
    ("cohere", {"use_qk_norm": True}),
    ("cohere2", SLIDING),
    ("cwm", SLIDING | {"bos_token_id": 1}),
    ("ernie4_5", {}),
    ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    ("exaone4", SLIDING),
    ("exaone_moe", SLIDING | EXPERTS),
    ("flex_olmo", EXPERTS),
    ("gemma", {}),
    ("glm", {}),
    ("glm4", {}),
    ("glm4_moe", {"use_qk_norm": True, "n_routed_experts": 4, "num_experts_per_tok": 2}),
    ("gpt_bigcode", {}),
    ("gpt_neox", {}),
    ("granite", MULTIPLIERS),
    ("granitemoe", MULTIPLIERS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("helium", {}),
    ("hunyuan_v1_dense", {}),
    ("jais2", {}),
    ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    ("ministral", SLIDING),
    ("ministral3", LATER),
    ("mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    ("nanochat", {}),
    ("olmo", {"clip_qkv": 1.0}),
    ("olmo2", {}),
    ("olmo3", SLIDING),
    ("olmoe", EXPERTS),
    ("phi", {}),
    ("qwen2_moe", EXPERTS),
    ("seed_oss", {}),
    ("solar_open", {"n_routed_experts": 4, "num_experts_per_tok": 2}),
    ("starcoder2", {"sliding_window": 9}),
    ("vaultgemma", SLIDING),
]


@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize(("arch", "config"), OWN)
def test_a_mixed_batch_of_the_llama_family_equals_peft_one_request_at_a_time(
    tmp_path: Path, arch: str, config: dict[str, Any], operators: OperatorsName
) -> None:
    hold_to_peft(tmp_path, arch, config, replace(SETTINGS, operators=operators))


@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize(
    ("arch", "config"),
    [*THROUGH, *(pytest.param(*case, marks=pytest.mark.long) for case in ALSO)],
)
def test_a_mixed_batch_through_transformers_equals_peft_one_request_at_a_time(
    tmp_path: Path, arch: str, config: dict[str, Any], operators: OperatorsName
) -> None:
    hold_to_peft(tmp_path, arch, config, replace(SETTINGS, operators=operators))


def hold_to_peft(folder: Path, arch: str, config: dict[str, Any], settings: EngineSettings) -> None:
    base = tiny.make_base(folder / "base", arch=arch, **config)
    linears = LINEARS.get(arch, tiny.LINEARS)
    adapters = {
        name: tiny.make_adapter(folder / name, base, rank=rank, seed=rank, targets=linears)
        for name, rank in (("a", 4), ("b", 16))
    }
    folders, rng = Folders(adapters), random.Random(1)
    names = ["a", None, "b", "a", None, "b"]
    wanted = mixed_requests(names, folders, rng, LENGTH)
    bases = Bases(folder / "bases")
    tiny.register(base, bases, "tiny")
    assert validate(adapters["b"], bases).rank == 16
    results = run_all(TorchEngine.create(base_of(base), folders, settings), wanted)
    oracles = {name: Oracle(base, adapters.get(name or "")) for name in ("a", "b", None)}
    others = {"a": "b", "b": None, None: "a"}
    for name, each, result in zip(names, wanted, results, strict=True):
        assert result.tokens == oracles[name].greedy(each.prompt_ids, LENGTH), name
        assert oracles[name].largest_error(each.prompt_ids, result) < BOUND, name
        # The oracle can tell: a wrong adapter, or none, exceeds the bound by far.
        wrong = oracles[others[name]]
        assert wrong.largest_error(each.prompt_ids, result) > 100 * BOUND, name


def test_every_architecture_that_is_served_is_held_to_peft() -> None:
    assert {arch for arch, _ in (*THROUGH, *ALSO)} == set(THROUGH_TRANSFORMERS)
    assert {arch for arch, _ in OWN} == set(LLAMA_FAMILY)


def test_an_unknown_architecture_is_refused_by_name_with_those_that_are_served(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(EngineUnavailable, match=r"config\.json: model_type='mamba'.*gpt2,.*llama,"):
        read_model(base_of(tmp_path), SETTINGS)


def test_an_attention_that_is_given_more_than_is_computed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss adds a learned sink to every row of scores: left out, all its answers change."""
    base = tiny.make_base(tmp_path / "base", arch="gpt_oss", num_local_experts=4)
    with pytest.raises(EngineUnavailable, match="model_type='gpt_oss'"):
        read_model(base_of(base), SETTINGS)
    monkeypatch.setattr("registry.architectures.THROUGH_TRANSFORMERS", ("gpt_oss",))
    with pytest.raises(EngineUnavailable, match="GptOssAttention gives its attention s_aux"):
        read_model(base_of(base), SETTINGS)


@pytest.mark.parametrize(
    ("arch", "config", "words"),
    [
        # The window of these is in transformers' mask only.
        (
            "qwen2_moe",
            SLIDING | {"use_sliding_window": True},
            "layer 0 is 'sliding_attention' and gives its attention the window None",
        ),
        ("gemma3_text", SLIDING | {"use_bidirectional_attention": True}, "keys that come later"),
        ("phi3", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config='set'"),
        ("gpt2", {"model_type": "gpt3"}, "model_type='gpt3'"),
    ],
)
def test_a_configuration_that_would_be_computed_wrongly_is_refused_at_start(
    tmp_path: Path, arch: str, config: dict[str, Any], words: str
) -> None:
    base = tiny.make_base(tmp_path / "base", arch=arch)
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(EngineUnavailable, match=words):
        read_model(base_of(base), SETTINGS)


def test_weights_that_do_not_fill_the_network_are_refused(tmp_path: Path) -> None:
    """transformers itself would fill the missing ones with random numbers and go on."""
    two = tiny.make_base(tmp_path / "two", arch="gpt2")
    three = tiny.make_base(tmp_path / "three", arch="gpt2", layers=3)
    two_layers = (two / "config.json").read_text()
    (two / "config.json").write_text((three / "config.json").read_text())
    with pytest.raises(EngineUnavailable, match=r"missing_keys, for example 'transformer\.h\.2"):
        read_model(base_of(two), SETTINGS)
    (three / "config.json").write_text(two_layers)
    with pytest.raises(EngineUnavailable, match="unexpected_keys"):
        read_model(base_of(three), SETTINGS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "1 tensors that llama does not compute with"),
        ("lm_head.weight", "Set tie_word_embeddings to false"),
    ],
)
def test_weights_that_the_own_forward_pass_would_leave_out_are_refused(
    tmp_path: Path, name: str, words: str
) -> None:
    base = tiny.make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors")
    read_model(base_of(base), SETTINGS)  # a copy of the embedding is what the config says
    save_file(tensors | {name: 2 * head}, base / "model.safetensors")
    with pytest.raises(EngineUnavailable, match=words):
        read_model(base_of(base), SETTINGS)


def test_longrope_is_served_up_to_the_length_at_which_its_angles_change(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.1] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 64,
    }
    base = tiny.make_base(
        tmp_path / "base",
        arch="phi3",
        rope_parameters=rope,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
    )
    with pytest.raises(EngineUnavailable, match="made for 64 tokens"):
        read_model(base_of(base), SETTINGS)
    engine = TorchEngine.create(base_of(base), Folders({}), replace(SETTINGS, max_model_len=64))
    wanted = request(list(range(30)), max_tokens=LENGTH, logprobs=5)
    [result] = run_all(engine, [wanted])
    assert Oracle(base).largest_error(wanted.prompt_ids, result) < BOUND
