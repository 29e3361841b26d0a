"""Tensors that do not fit are refused, and bytes that are not the safetensors they claim to be."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file as save_torch_file

from registry.base import Bases
from registry.errors import BaseMismatch, Refused
from registry.tensors import ADAPTER_BOUNDS, largest_magnitudes, read_header
from registry.validate import validate
from tests.registry.gate import F32, GOOD, WEIGHTS, Adapter, codes, gate, refused, with_value
from tests.registry.making import UP, Q, adapter_tensors, key


def _changed(changes: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors = adapter_tensors() | changes
    return {name: value for name, value in tensors.items() if value is not None}


BAD_TENSORS = {
    "no tensors": ({}, {"no_tensors", "target_missing"}),
    "A without B": (_changed({key(Q, "B"): None}), {"orphan", "target_missing"}),
    "B without A": (_changed({key(UP, "A"): None}), {"orphan", "target_missing"}),
    "NaN": (with_value(key(Q, "A"), 31, np.nan), {"non_finite"}),
    "infinity": (with_value(key(UP, "B"), 0, -np.inf), {"non_finite"}),
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
    found = dict(largest_magnitudes(folder / WEIGHTS, header.values()))
    assert max(found.values()) == largest
    for bad in (float("nan"), float("-inf")):
        spoiled = tensors[key(Q, "A")].clone()
        spoiled[1, 1] = bad
        save_torch_file(tensors | {key(Q, "A"): spoiled}, folder / WEIGHTS)
        with pytest.raises(Refused) as error:
            validate(folder, bases)
        assert codes(error) == {"non_finite"}


# Bytes that are not the safetensors file they claim to be.


def _file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(start: int = 0, stop: int = 4, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


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
