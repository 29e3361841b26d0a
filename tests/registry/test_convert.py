"""Adapters of convertible types that are not what their type says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from registry.adapter import AdapterName
from registry.base import Bases
from registry.convert import convert
from registry.errors import Refused
from registry.store import Registry
from registry.validate import validate
from tests.registry.making import BASE_ID, UP, Q

F32 = np.float32
WEIGHTS = "adapter_model.safetensors"
LOHA: dict[str, tuple[int, ...]] = {
    "hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8),
}  # fmt: skip


def write(folder: Path, shapes: dict[str, tuple[int, ...]], module: str = Q, **config: Any) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {
        name if name.startswith("base_model.") else f"base_model.model.{module}.{name}": (
            rng.standard_normal(shape).astype(F32)
        )
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LOHA",
        "base_model_name_or_path": BASE_ID,
        "r": 2,
        "alpha": 4,
        "target_modules": [module.rsplit(".", 1)[-1]],
    } | config
    known = {name: value for name, value in fields.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(known))
    return folder


def codes(folder: Path, bases: Bases) -> set[str]:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Refused) as error:
        convert(folder, bases)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return {code for code, _ in error.value.problems}


def test_the_product_of_the_factors_is_the_change(bases: Bases, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", LOHA)
    old = {name[-9:]: value for name, value in load_file(folder / WEIGHTS).items()}
    assert convert(folder, bases) == (
        "converted",
        "LoHa was stored as the LoRA that it is, of rank 4.",
    )
    new = load_file(folder / WEIGHTS)
    key = f"base_model.model.{Q}.lora_"
    change = (old["hada_w1_a"] @ old["hada_w1_b"]) * (old["hada_w2_a"] @ old["hada_w2_b"]) * 2
    np.testing.assert_allclose(new[f"{key}B.weight"] @ new[f"{key}A.weight"], change, atol=1e-5)
    assert validate(folder, bases).rank == 4


def test_a_lora_is_left_alone(bases: Bases, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"lora_A.weight": (2, 8)}, peft_type="LORA")
    before = (folder / WEIGHTS).read_bytes()
    assert convert(folder, bases) is None
    assert (folder / WEIGHTS).read_bytes() == before


def test_the_same_adapter_pushed_again_is_the_same_version(bases: Bases, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", LOHA)
    with Registry.open(tmp_path / "home", bases) as registry:
        name = AdapterName("acme", "a")
        first = registry.push(folder, name, actor="test")
        again = registry.push(folder, name, actor="test")
    assert (first.created, again.created) == (True, False)
    assert first.version.digest == again.version.digest
    assert "converted" in {code for code, _ in first.warnings}


@pytest.mark.parametrize(
    ("change", "config", "found"),
    [
        ({"hada_w1_a": (7, 2)}, {}, {"shape_mismatch"}),
        ({"hada_w2_b": (3, 8)}, {}, {"shape_mismatch"}),
        ({"hada_w1_b": (2, 8, 1)}, {}, {"shape_mismatch"}),
        ({"hada_t1": (2, 2)}, {}, {"unknown_key"}),
        ({}, {"target_modules": ["k_proj"]}, {"module_not_targeted"}),
        ({}, {"alpha": -1}, {"config_invalid"}),
        ({}, {"surprise": 1}, {"config_unknown_field"}),
        ({}, {"modules_to_save": ["lm_head"]}, {"config_unsupported"}),
        ({}, {"peft_type": "VERA"}, {"config_unknown_field"}),
    ],
)
def test_what_is_not_what_its_type_says_is_refused_and_untouched(
    bases: Bases,
    tmp_path: Path,
    change: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    found: set[str],
) -> None:
    assert codes(write(tmp_path / "a", LOHA | change, **config), bases) == found


def test_half_of_the_factors_are_refused(bases: Bases, tmp_path: Path) -> None:
    half = {name: shape for name, shape in LOHA.items() if "w1" in name}
    assert codes(write(tmp_path / "a", half), bases) == {"tensor_missing"}


def test_a_module_that_the_base_does_not_have_is_refused(bases: Bases, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", LOHA, module="model.layers.7.self_attn.q_proj")
    assert codes(folder, bases) == {"module_not_in_base"}


def test_a_product_over_the_highest_rank_is_refused_before_it_is_made(
    bases: Bases, tmp_path: Path
) -> None:
    shapes = {"lokr_w1": (1, 1), "lokr_w2_a": (8, 300), "lokr_w2_b": (300, 8)}
    folder = write(tmp_path / "a", shapes, peft_type="LOKR")
    assert codes(folder, bases) == {"rank_invalid"}


def test_vera_without_its_shared_matrices_says_how_to_save_them(
    bases: Bases, tmp_path: Path
) -> None:
    shapes = {"vera_lambda_b": (8,), "vera_lambda_d": (4,)}
    options = {"peft_type": "VERA", "r": 4, "alpha": None, "save_projection": False}
    folder = write(tmp_path / "a", shapes, **options)
    with pytest.raises(Refused, match="save_projection=False: must be one of True"):
        convert(folder, bases)


def test_shared_matrices_that_are_too_small_are_refused(bases: Bases, tmp_path: Path) -> None:
    shapes = {
        "vera_lambda_b": (12,),
        "vera_lambda_d": (4,),
        "base_model.vera_A": (4, 8),
        "base_model.vera_B": (10, 4),
    }
    folder = write(tmp_path / "a", shapes, module=UP, peft_type="VERA", r=4, alpha=None)
    assert codes(folder, bases) == {"shape_mismatch"}
