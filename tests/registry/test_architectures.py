import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry.architectures import (
    LLAMA_FAMILY,
    THROUGH_TRANSFORMERS,
    module_of,
    name_in_peft,
    unsupported_architecture,
)
from registry.base import linear_shapes
from registry.tensors import read_folder


@pytest.mark.parametrize("kind", [*LLAMA_FAMILY, *THROUGH_TRANSFORMERS])
def test_an_architecture_that_is_served_has_no_problem(kind: str) -> None:
    assert unsupported_architecture({"model_type": kind}) is None


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {"model_type": None}, {}])
def test_any_other_is_told_by_its_name_with_those_that_are_served(
    config: dict[str, str | None],
) -> None:
    problem = unsupported_architecture(config)
    assert problem is not None
    assert f"model_type={config.get('model_type')!r}" in problem
    assert all(kind in problem for kind in (*LLAMA_FAMILY, *THROUGH_TRANSFORMERS))


def test_linears_of_gpt2_are_read_the_other_way_round_and_named_as_peft_does(
    tmp_path: Path,
) -> None:
    tensors = {
        "h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32),
        "transformer.h.1.mlp.c_fc.weight": np.zeros((8, 32), np.float32),
        "wte.weight": np.zeros((50, 8), np.float32),
        "h.0.attn.c_attn.bias": np.zeros(24, np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_folder(tmp_path)
    assert linear_shapes(found, "gpt2") == {
        "transformer.h.0.attn.c_attn": (24, 8),
        "transformer.h.1.mlp.c_fc": (32, 8),
    }
    assert linear_shapes(found, "llama")["h.0.attn.c_attn"] == (8, 24)
    assert module_of("h.0.x.weight", "llama") == "h.0.x"
    names = ("wte.weight", "h.0.ln_1.bias", "lm_head.weight", "transformer.ln_f.weight")
    assert [name_in_peft(name, "gpt2") for name in names] == [
        *("transformer.wte.weight", "transformer.h.0.ln_1.bias", *names[2:]),
    ]


def test_the_page_of_the_engine_names_every_architecture_that_is_served() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \| (own|transformers) \|", page, re.MULTILINE)
    named: dict[str, set[str]] = {"own": set(), "transformers": set()}
    for kinds, how in rows:
        named[how] |= set(re.findall(r"`(\w+)`", kinds))
    assert named == {"own": set(LLAMA_FAMILY), "transformers": set(THROUGH_TRANSFORMERS)}
