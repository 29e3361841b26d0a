"""A config that names what cannot be served, or that could run code or open a file, is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from registry.base import Bases
from registry.errors import Refused
from tests.registry.gate import Adapter, gate, refused
from tests.registry.making import adapter_config


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"use_dora": True}, "orphan"),
        ({"use_dora": 0}, "config_invalid"),
        ({"bias": "some"}, "config_invalid"),
        ({"lora_bias": True}, "orphan"),
        ({"modules_to_save": ["lm_head"]}, "tensor_missing"),
        ({"trainable_token_indices": [1]}, "tensor_missing"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "tensor_missing"),
        ({"layer_replication": [[0, 1]]}, "config_unsupported"),
        ({"target_parameters": ["experts.w1"]}, "config_unsupported"),
        ({"alora_invocation_tokens": [1, 2]}, "config_unsupported"),
        ({"use_qalora": True}, "config_unsupported"),
        ({"use_bdlora": {"nblocks": 2}}, "config_unsupported"),
        ({"arrow_config": {}}, "config_unsupported"),
        ({"kasa_config": {"beta": 1}}, "config_unsupported"),
        ({"velora_config": {}}, "config_unsupported"),
        ({"monteclora_config": {}}, "config_unsupported"),
        ({"fan_in_fan_out": 1}, "config_invalid"),
        ({"ensure_weight_tying": 1}, "config_invalid"),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "tensor_missing"),
        ({"corda_config": {"cache_file": "/tmp/x.pt"}}, "config_unsupported"),
        ({"lora_ga_config": {}}, "config_unsupported"),
        ({"loftq_config": {"loftq_bits": 4}}, "config_unsupported"),
        ({"eva_config": {"rho": 2.0}}, "config_unsupported"),
        ({"megatron_config": {"x": 1}}, "unsafe_config_field"),
        ({"megatron_core": "os"}, "unsafe_config_field"),
        ({"auto_mapping": {"parent_library": "os"}}, "unsafe_config_field"),
        ({"runtime_config": {}}, "unsafe_config_field"),
        ({"trust_remote_code": True}, "config_unknown_field"),
        ({"from_the_future": 1}, "config_unknown_field"),
        ({"init_lora_weights": "pissa"}, "mutates_base"),
        ({"init_lora_weights": "pissa_niter_16"}, "mutates_base"),
        ({"init_lora_weights": "PiSSA"}, "mutates_base"),
        ({"init_lora_weights": "olora"}, "mutates_base"),
        ({"init_lora_weights": "corda"}, "mutates_base"),
        ({"init_lora_weights": "loftq"}, "mutates_base"),
        ({"init_lora_weights": "lora_ga"}, "mutates_base"),
        ({"init_lora_weights": "kasa"}, "mutates_base"),
        ({"init_lora_weights": "magic"}, "config_invalid"),
        ({"init_lora_weights": None}, "config_invalid"),
        ({"peft_type": "OFT"}, "config_invalid"),
        ({"peft_type": None}, "config_invalid"),
        ({"task_type": "SEQ_CLS"}, "config_invalid"),
        ({"r": 0}, "rank_invalid"),
        ({"r": 257}, "rank_invalid"),
        ({"r": True}, "rank_invalid"),
        ({"r": "4"}, "rank_invalid"),
        ({"r": 4.0}, "rank_invalid"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_invalid"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_invalid"),
        ({"rank_pattern": {"q_proj|up_proj": 4}}, "rank_invalid"),
        ({"rank_pattern": [4]}, "rank_invalid"),
        ({"alpha_pattern": {".*" * 50: 4}}, "config_invalid"),
        ({"alpha_pattern": {"q" * 201: 4}}, "config_invalid"),
        ({"alpha_pattern": {f"m{i}": 4 for i in range(4097)}}, "config_invalid"),
        ({"lora_alpha": 0}, "config_invalid"),
        ({"lora_alpha": -8}, "config_invalid"),
        ({"lora_alpha": 1e30}, "config_invalid"),
        ({"lora_alpha": 10**4000}, "config_invalid"),
        ({"lora_alpha": None}, "config_invalid"),
        ({"lora_dropout": 2}, "config_invalid"),
        ({"use_rslora": 1}, "config_invalid"),
        ({"inference_mode": "yes"}, "config_invalid"),
        ({"target_modules": None}, "config_invalid"),
        ({"target_modules": []}, "config_invalid"),
        ({"target_modules": ["../q_proj"]}, "config_invalid"),
        ({"target_modules": ["a"] * 4097}, "config_invalid"),
        ({"target_modules": "x" * 4097}, "config_invalid"),
        ({"exclude_modules": [3]}, "config_invalid"),
        ({"layers_to_transform": [-1]}, "config_invalid"),
        ({"layers_to_transform": ["0"]}, "config_invalid"),
        ({"layers_pattern": ["(a+)+"]}, "config_invalid"),
        ({"layers_pattern": [f"layers_{i}" for i in range(17)]}, "config_invalid"),
        ({"alpha_pattern": {"mlp\\.up_proj": 4, "mlp.up_proj": 8}}, "config_invalid"),
        ({"base_model_name_or_path": 7}, "config_invalid"),
        ({"revision": ["main"]}, "config_invalid"),
        ({"base_model_name_or_path": None}, "base_unnamed"),
        ({"base_model_name_or_path": "/models/base"}, "base_unnamed"),
        ({"base_model_name_or_path": "./base"}, "base_unnamed"),
        ({"base_model_name_or_path": "../base"}, "base_unnamed"),
        ({"base_model_name_or_path": "C:\\base"}, "base_unnamed"),
        ({"target_modules": ["q_proj"]}, "module_not_targeted"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "target_missing"),
        ({"target_modules": ["q_proj", "up_proj", "proj"]}, "target_missing"),
        ({"exclude_modules": ["q_proj"]}, "module_not_targeted"),
        ({"layers_to_transform": [1]}, "module_not_targeted"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "module_not_targeted"),
        ({"r": 5}, "rank_mismatch"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_mismatch"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_served_is_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    assert refused(adapter(config=changes), bases, tmp_path) == {code}


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_config_without_a_needed_field_is_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, field: str
) -> None:
    folder = adapter()
    config = {name: value for name, value in adapter_config().items() if name != field}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert refused(folder, bases, tmp_path) == {"config_invalid"}


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b'"r"', b"\xff\xfe", b'{"r": NaN}', b'{"r": 1e999}',
        b'{"r": 4, "r": 8}', b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50,
        b'{"r": ' + b"9" * 5000 + b"}", b'{"a": "\x01"}', b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}', b"{" + b",".join(b'"%d":1' % i for i in range(60_000)) + b',"9":1}',
    ],
)  # fmt: skip
def test_broken_json_is_refused_in_a_sentence(
    adapter: Adapter, bases: Bases, tmp_path: Path, text: bytes
) -> None:
    folder = adapter(card={})
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "wardrobe.json").write_bytes(text)
    with pytest.raises(Refused) as error:
        gate(folder, bases, tmp_path)
    assert [code for code, _ in error.value.problems] == ["json_invalid", "json_invalid"]
