"""The gate: every hostile or mistaken folder is refused with the code of its reason."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from safetensors.torch import save_file as save_torch_file

from registry.base import BaseModel, Bases
from registry.errors import BaseMismatch, BaseNotFound, Refused
from registry.lora import AdapterConfig
from registry.tensors import ADAPTER_BOUNDS, largest_magnitude, read_header
from registry.upload import check_files, copy_upload
from registry.validate import Checked, validate
from tests.registry.making import BASE_ID, UP, Q, adapter_config, adapter_tensors, key

Adapter = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


def gate(folder: Path, bases: Bases, tmp_path: Path, base: str | None = None) -> Checked:
    """Do what a push does before it stores anything."""
    staging = tmp_path / "staging"
    staging.mkdir()
    copy_upload(folder, staging)
    return validate(staging, bases, base=base)


def config_of(checked: Checked) -> AdapterConfig:
    assert checked.config is not None
    return checked.config


def codes(error: pytest.ExceptionInfo[Refused]) -> set[str]:
    assert error.value.message
    return {code for code, _ in error.value.problems}


def refused(folder: Path, bases: Bases, tmp_path: Path) -> set[str]:
    with pytest.raises(Refused) as error:
        gate(folder, bases, tmp_path)
    return codes(error)


def test_a_good_adapter_passes_without_a_warning(
    adapter: Adapter, bases: Bases, base: BaseModel, tmp_path: Path
) -> None:
    checked = gate(adapter(), bases, tmp_path)
    assert checked.warnings == ()
    assert checked.rank == 4
    assert checked.base == base
    assert config_of(checked).base_id == BASE_ID


# Configs that name what cannot be served, or that could run code or open a file.


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"use_dora": True}, "config_unsupported"),
        ({"use_dora": 0}, "config_unsupported"),
        ({"bias": "all"}, "config_unsupported"),
        ({"bias": "lora_only"}, "config_unsupported"),
        ({"lora_bias": True}, "config_unsupported"),
        ({"modules_to_save": ["lm_head"]}, "config_unsupported"),
        ({"trainable_token_indices": [1]}, "config_unsupported"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "config_unsupported"),
        ({"layer_replication": [[0, 1]]}, "config_unsupported"),
        ({"target_parameters": ["experts.w1"]}, "config_unsupported"),
        ({"alora_invocation_tokens": [1, 2]}, "config_unsupported"),
        ({"use_qalora": True}, "config_unsupported"),
        ({"use_bdlora": {"nblocks": 2}}, "config_unsupported"),
        ({"arrow_config": {}}, "config_unsupported"),
        ({"kasa_config": {"beta": 1}}, "config_unsupported"),
        ({"velora_config": {}}, "config_unsupported"),
        ({"monteclora_config": {}}, "config_unsupported"),
        ({"fan_in_fan_out": True}, "config_unsupported"),
        ({"ensure_weight_tying": True}, "config_unsupported"),
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
        ({"peft_type": "IA3"}, "config_invalid"),
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


# Tensors that do not fit the base, the config or each other.


def _changed(changes: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors = adapter_tensors() | changes
    return {name: value for name, value in tensors.items() if value is not None}


def _with(name: str, index: int, value: float) -> dict[str, np.ndarray]:
    tensors = adapter_tensors()
    tensors[name].flat[index] = value
    return tensors


F32 = np.float32
BAD_TENSORS = {
    "no tensors": ({}, {"no_tensors", "target_missing"}),
    "A without B": (_changed({key(Q, "B"): None}), {"orphan", "target_missing"}),
    "B without A": (_changed({key(UP, "A"): None}), {"orphan", "target_missing"}),
    "NaN": (_with(key(Q, "A"), 31, np.nan), {"non_finite"}),
    "infinity": (_with(key(UP, "B"), 0, -np.inf), {"non_finite"}),
    "rank differs in A": (_changed({key(Q, "A"): np.ones((3, 8), F32)}), {"rank_mismatch"}),
    "rank differs in B": (_changed({key(Q, "B"): np.ones((8, 3), F32)}), {"rank_mismatch"}),
    "wrong input size": (_changed({key(Q, "A"): np.ones((4, 9), F32)}), {"shape_mismatch"}),
    "wrong output size": (_changed({key(UP, "B"): np.ones((11, 4), F32)}), {"shape_mismatch"}),
    "transposed": (_changed({key(UP, "B"): np.ones((4, 12), F32)}),
                   {"shape_mismatch", "rank_mismatch"}),
    "vector": (_changed({key(Q, "A"): np.ones(32, F32)}), {"empty_tensor"}),
    "three dimensions": (_changed({key(Q, "A"): np.ones((4, 8, 1), F32)}), {"empty_tensor"}),
    "empty": (_changed({key(Q, "A"): np.ones((0, 8), F32)}), {"empty_tensor"}),
    "double precision": (_changed({key(Q, "A"): np.ones((4, 8))}), {"dtype_unsupported"}),
    "integers": (_changed({key(Q, "A"): np.ones((4, 8), np.int8)}), {"dtype_unsupported"}),
    "full weight": (_changed({"base_model.model.lm_head.weight": np.ones((2, 2), F32)}),
                    {"unknown_key"}),
    "DoRA magnitude": (_changed({f"base_model.model.{Q}.lora_magnitude_vector": np.ones(8, F32)}),
                       {"unknown_key"}),
    "no prefix": (_changed({f"{Q}.lora_A.weight": np.ones((4, 8), F32)}), {"unknown_key"}),
    "adapter name in the key": (
        _changed({f"base_model.model.{Q}.lora_A.default.weight": np.ones((4, 8), F32)}),
        {"unknown_key"},
    ),
    "path in the key": (
        _changed({"base_model.model.../../etc/x.lora_A.weight": np.ones((4, 8), F32)}),
        {"unknown_key"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, case: str
) -> None:
    tensors, expected = BAD_TENSORS[case]
    assert refused(adapter(tensors=tensors), bases, tmp_path) == expected


def test_a_module_the_base_does_not_have_is_a_mismatch(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    other = "model.layers.7.self_attn.q_proj"
    pair = {key(other, "A"): np.ones((4, 8), F32), key(other, "B"): np.ones((8, 4), F32)}
    with pytest.raises(BaseMismatch) as error:
        gate(adapter(tensors=adapter_tensors() | pair), bases, tmp_path)
    assert codes(error) == {"module_not_in_base"}


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_lora_on_the_head_or_embeddings_is_refused_as_not_servable_yet(
    adapter: Adapter, bases: Bases, tmp_path: Path, module: str
) -> None:
    pair = {key(module, "A"): np.ones((4, 8), F32), key(module, "B"): np.ones((16, 4), F32)}
    folder = adapter(
        tensors=adapter_tensors() | pair,
        config={"target_modules": ["q_proj", "up_proj", module.rsplit(".", 1)[-1]]},
    )
    assert refused(folder, bases, tmp_path) == {"module_unsupported"}


def test_a_file_that_is_wrong_in_very_many_places_is_refused_in_a_short_answer(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(config={f"unknown_{i}": 1 for i in range(20_000)})
    with pytest.raises(Refused, match="There are more problems") as error:
        gate(folder, bases, tmp_path)
    assert len(error.value.message) < 3000
    assert len(error.value.problems) == 101
    assert error.value.problems[-1] == ("not_listed", "There are more problems.")


def test_all_problems_are_told_at_once(adapter: Adapter, bases: Bases, tmp_path: Path) -> None:
    folder = adapter(
        config={"use_dora": True, "r": 0, "from_the_future": 1},
        tensors=adapter_tensors() | {"stray": np.ones(1, F32)},
        card={"weights": "elsewhere"},
    )
    assert refused(folder, bases, tmp_path) == {
        "card_unknown_field",
        "config_unsupported",
        "rank_invalid",
        "config_unknown_field",
        "unknown_key",
    }


# Bytes that are not the safetensors file they claim to be.


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(start: int = 0, stop: int = 4, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


GOOD = save(adapter_tensors())
BAD_FILES = {
    "empty": (b"", "header_invalid"),
    "seven bytes": (b"\0" * 7, "header_invalid"),
    "length beyond the file": (_file({}, length=1 << 20), "header_invalid"),
    "length of 2**64 - 1": (_file({}, length=(1 << 64) - 1), "header_invalid"),
    "header over 1 MiB": (_file(b"{" + b" " * (1 << 20) + b"}"), "header_too_large"),
    "not JSON": (_file(b"{'a'}"), "header_invalid"),
    "leading space": (_file(b" {}"), "header_invalid"),
    "array": (_file(b"[]"), "header_invalid"),
    "deep": (_file(b'{"a":' * 60_000), "header_invalid"),
    "duplicate key": (
        _file(b'{"a":%b,"a":%b}' % ((json.dumps(_entry()).encode(),) * 2), b"\0" * 4),
        "header_invalid",
    ),
    "too many tensors": (
        _file({f"t{i}": _entry(0, 0, shape=[0]) for i in range(4097)}), "header_invalid"),
    "metadata is no object": (_file({"__metadata__": [1]}), "header_invalid"),
    "metadata holds a number": (_file({"__metadata__": {"a": 1}}), "header_invalid"),
    "entry is a list": (_file({"a": []}), "header_invalid"),
    "entry lacks a field": (_file({"a": {"dtype": "F32"}}), "header_invalid"),
    "extra field": (_file({"a": _entry(x=1)}, b"\0" * 4), "header_invalid"),
    "unknown dtype": (_file({"a": _entry(dtype="F4")}, b"\0" * 4), "dtype_unsupported"),
    "dtype is a list": (_file({"a": _entry(dtype=[])}, b"\0" * 4), "dtype_unsupported"),
    "negative size": (_file({"a": _entry(shape=[-1])}, b"\0" * 4), "header_invalid"),
    "size is true": (_file({"a": _entry(shape=[True])}, b"\0" * 4), "header_invalid"),
    "size overflows": (_file({"a": _entry(shape=[1 << 62, 4])}, b"\0" * 4), "header_invalid"),
    "100,000 dimensions": (_file({"a": _entry(shape=[1] * 100_000)}, b"\0" * 4), "header_invalid"),
    "shape and bytes differ": (_file({"a": _entry(shape=[2])}, b"\0" * 4), "offsets_invalid"),
    "start after stop": (_file({"a": _entry(4, 0)}, b"\0" * 4), "offsets_invalid"),
    "overlap": (_file({"a": _entry(), "b": _entry(2, 6)}, b"\0" * 6), "offsets_invalid"),
    "hole": (_file({"a": _entry(), "b": _entry(8, 12)}, b"\0" * 12), "offsets_invalid"),
    "hole at the start": (_file({"a": _entry(4, 8)}, b"\0" * 8), "offsets_invalid"),
    "trailing bytes": (GOOD + b"\0", "offsets_invalid"),
    "truncated": (GOOD[:-1], "offsets_invalid"),
    "name with a control character": (_file({"a\0": _entry()}, b"\0" * 4), "header_invalid"),
    "name of 513 characters": (_file({"a" * 513: _entry()}, b"\0" * 4), "header_invalid"),
    "pickle": (pickle.dumps({"a": 1}), "pickle_refused"),
    "old pickle": (pickle.dumps({"a": 1}, 2), "pickle_refused"),
    "zip": (b"PK\x03\x04" + b"\0" * 64, "pickle_refused"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"\0" * 64, "pickle_refused"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 64, "pickle_refused"),
    "program": (b"\x7fELF\x02\x01\x01\0" + b"\0" * 64, "pickle_refused"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bytes_that_are_not_a_safetensors_file_are_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, case: str
) -> None:
    data, code = BAD_FILES[case]
    folder = adapter()
    (folder / WEIGHTS).write_bytes(data)
    assert code in refused(folder, bases, tmp_path)


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder, length = adapter(), struct.unpack("<Q", GOOD[:8])[0]
    padded = GOOD[8 : 8 + length].ljust(0x0480)  # its length begins with the bytes 80 04
    (folder / WEIGHTS).write_bytes(_file(padded, GOOD[8 + length :]))
    assert pickle.dumps(1).startswith((folder / WEIGHTS).read_bytes()[:2])
    assert gate(folder, bases, tmp_path).warnings == ()


# Files that do not belong.


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("adapter_model.bin", "pickle_refused"),
        ("optimizer.pt", "pickle_refused"),
        ("weights.GGUF", "pickle_refused"),
        ("archive.zip", "pickle_refused"),
        ("train.py", "file_not_allowed"),
        ("tokenizer.json", "file_unexpected"),
        (".hidden", "file_not_allowed"),
        ("README.MD", "file_not_allowed"),
        ("a\nb", "file_not_allowed"),
    ],
)
def test_other_files_are_refused_by_name(
    adapter: Adapter, bases: Bases, tmp_path: Path, name: str, code: str
) -> None:
    folder = adapter()
    (folder / name).write_bytes(b"anything")
    assert refused(folder, bases, tmp_path) == {code}


def test_links_folders_and_pipes_are_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter()
    (tmp_path / "secret").write_text("{}")
    (folder / "wardrobe.json").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "README.md")
    (folder / "checkpoint-1").mkdir()
    assert refused(folder, bases, tmp_path) == {"not_a_regular_file", "file_not_allowed"}


def test_a_zip_named_safetensors_is_refused(adapter: Adapter, bases: Bases, tmp_path: Path) -> None:
    folder = adapter()
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(1))
    assert refused(folder, bases, tmp_path) == {"pickle_refused"}


def test_too_large_files_are_refused_before_they_are_read(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={})
    for name, size in (("wardrobe.json", 1 << 21), ("README.md", 1 << 21), (WEIGHTS, 3 << 30)):
        (folder / name).touch()
        os.truncate(folder / name, size)  # a sparse file: no byte is written
    with pytest.raises(Refused) as error:
        gate(folder, bases, tmp_path)
    assert [code for code, _ in error.value.problems] == ["too_large"] * 3


def test_both_adapter_files_are_needed(bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused) as error:
        gate(tmp_path / "empty", bases, tmp_path)
    assert [code for code, _ in error.value.problems] == ["file_missing"] * 2


# Cards.


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ({"weights": 1}, "card_unknown_field"),
        ({"base": "acme/tiny-base"}, "card_invalid"),
        ({"base": {"path": "/x"}}, "card_invalid"),
        ({"base": {"id": 7}}, "card_invalid"),
        ({"prompt": {"system": 7}}, "card_invalid"),
        ({"prompt": {"template": "x"}}, "card_invalid"),
        ({"prompt": {"system": "x" * 32_769}}, "card_invalid"),
        ({"gate": {}}, "card_invalid"),
        ({"gate": {"passed": True, "failures": ["no"]}}, "card_invalid"),
        ({"gate": {"passed": False}}, "card_invalid"),
        ({"gate": {"passed": False, "failures": [1]}}, "card_invalid"),
        ({"gate": {"passed": 1, "failures": []}}, "card_invalid"),
        ({"gate": {"passed": False, "failures": "accuracy"}}, "card_invalid"),
        ({"kind": "base"}, "card_invalid"),
        ({"kind": 1}, "card_invalid"),
        ({"metrics": [1]}, "card_invalid"),
    ],
)
def test_a_card_that_is_not_understood_is_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, card: dict[str, Any], code: str
) -> None:
    assert refused(adapter(card=card), bases, tmp_path) == {code}


# Which base model.


def test_the_base_comes_from_the_caller_the_card_or_the_config(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    local = {"base_model_name_or_path": "/home/me/base"}
    by_card = adapter(config=local, card={"base": {"id": BASE_ID}})
    assert config_of(gate(by_card, bases, tmp_path)).base_id == BASE_ID
    (tmp_path / "caller").mkdir()
    checked = gate(adapter(config=local), bases, tmp_path / "caller", base=BASE_ID)
    assert config_of(checked).to_json()["base_model_name_or_path"] == BASE_ID


def test_a_caller_who_names_another_base_than_the_card_is_told_so(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={"base": {"id": "acme/other"}})
    with pytest.raises(BaseMismatch, match="acme/other"):
        gate(folder, bases, tmp_path, base=BASE_ID)


def test_a_base_that_is_not_here_says_how_to_get_it(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    with pytest.raises(BaseNotFound, match="wardrobe base pull acme/absent"):
        gate(adapter(config={"base_model_name_or_path": "acme/absent"}), bases, tmp_path)


def test_another_structure_under_the_same_id_is_a_mismatch(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={"base": {"id": BASE_ID, "structure": "0" * 64}})
    with pytest.raises(BaseMismatch) as error:
        gate(folder, bases, tmp_path)
    assert codes(error) == {"base_mismatch"}


# What is accepted with a warning.


def warnings_of(folder: Path, bases: Bases, tmp_path: Path) -> list[str]:
    return [code for code, _ in gate(folder, bases, tmp_path).warnings]


def test_other_weights_of_the_same_base_are_a_warning(
    adapter: Adapter, bases: Bases, base: BaseModel, tmp_path: Path
) -> None:
    card = {"base": {"id": BASE_ID, "fingerprint": "0" * 64, "structure": base.structure}}
    assert warnings_of(adapter(card=card), bases, tmp_path) == ["base_weights_differ"]


def test_an_adapter_that_changes_nothing_is_a_warning(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    zeros = {name: t * (".lora_A." in name) for name, t in adapter_tensors().items()}
    assert warnings_of(adapter(tensors=zeros), bases, tmp_path) == ["noop_adapter"]


def test_huge_values_and_mixed_dtypes_are_warnings(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    tensors = _with(key(Q, "A"), 0, -20_000) | {key(UP, "A"): np.ones((4, 8), np.float16)}
    found = warnings_of(adapter(tensors=tensors), bases, tmp_path)
    assert found == ["suspicious_scale", "mixed_dtypes"]


def test_targeted_modules_without_tensors_are_a_warning(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    only_q = {name: t for name, t in adapter_tensors().items() if "q_proj" in name}
    folder = adapter(tensors=only_q, config={"target_modules": ["q_proj"]})
    assert warnings_of(folder, bases, tmp_path) == []
    (tmp_path / "b").mkdir()
    folder = adapter(tensors=only_q, config={"target_modules": "(a+)+$"})
    checked = gate(folder, bases, tmp_path / "b")
    assert [code for code, _ in checked.warnings] == ["targets_written_out"]
    assert config_of(checked).to_json()["target_modules"] == [Q]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_type_is_accepted_and_its_nan_and_infinity_are_found(
    adapter: Adapter, bases: Bases, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = adapter()
    tensors = {name: torch.from_numpy(t).to(dtype) for name, t in adapter_tensors().items()}
    save_torch_file(tensors, folder / WEIGHTS)
    assert validate(folder, bases).warnings == ()
    largest = max(float(tensor.abs().max()) for tensor in tensors.values())
    header = read_header(folder / WEIGHTS, ADAPTER_BOUNDS)
    assert max(largest_magnitude(tensor) for tensor in header.values()) == largest
    for bad in (float("nan"), float("-inf")):
        spoiled = tensors[key(Q, "A")].clone()
        spoiled[1, 1] = bad
        save_torch_file(tensors | {key(Q, "A"): spoiled}, folder / WEIGHTS)
        with pytest.raises(Refused) as error:
            validate(folder, bases)
        assert codes(error) == {"non_finite"}


@pytest.mark.parametrize("limit", ["header", "data"])
def test_mutated_files_are_refused_or_read_never_a_crash(
    adapter: Adapter, bases: Bases, tmp_path: Path, limit: str
) -> None:
    """A thousand files with random bytes changed: the gate answers each in its own words."""
    folder, rng = adapter(), np.random.default_rng(3)
    header = 8 + struct.unpack("<Q", GOOD[:8])[0]
    outcomes = {"refused": 0, "read": 0}
    for _ in range(1000):
        data = bytearray(GOOD)
        low, high = (0, header) if limit == "header" else (header, len(data))
        for position in rng.integers(low, high, size=rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        (folder / WEIGHTS).write_bytes(data)
        try:
            validate(folder, bases)
            outcomes["read"] += 1
            assert load_file(folder / WEIGHTS).keys() == adapter_tensors().keys()
        except Refused:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0
    assert sum(outcomes.values()) == 1000


def test_a_file_is_checked_in_the_copy_not_in_the_source(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    """Whoever changes the source after it was checked changes nothing that is stored."""
    folder, staging = adapter(), tmp_path / "staging"
    staging.mkdir()
    files = copy_upload(folder, staging)
    save_file(adapter_tensors(9), folder / WEIGHTS)
    validate(staging, bases)
    assert (staging / WEIGHTS).read_bytes() == GOOD
    assert files[WEIGHTS].size == len(GOOD)


def test_the_first_bytes_are_checked_in_the_copy_too(
    adapter: Adapter, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README becomes a pickle after the folder was looked through."""
    folder = adapter()
    (folder / "README.md").write_text("# Support")

    def look_and_swap(source: Path) -> list[tuple[str, str]]:
        problems = check_files(source)
        (source / "README.md").write_bytes(pickle.dumps(1))
        return problems

    monkeypatch.setattr("registry.upload.check_files", look_and_swap)
    assert refused(folder, bases, tmp_path) == {"pickle_refused"}
