"""PEFT is the oracle: what it saves is accepted, what is pulled loads in it, the rules agree."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from registry.adapter import AdapterName, Selector
from registry.base import Bases
from registry.config import UNSUPPORTED
from registry.errors import Refused
from registry.lora import AdapterConfig, first_match
from registry.parts import sort_parts
from registry.store import Registry
from tests.tiny import make_base

BASE = "acme/tiny-llama"
NAME = AdapterName.parse("acme/support")
IDS = torch.tensor([[5, 17, 33, 80, 2]])

# peft 0.21 asks transformers 5 for an attribute that has a new name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
]

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 5},
    "all linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 6, "up_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "q_proj": 30},
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "excluded": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "regex": {"target_modules": r".*layers\.\d\.self_attn\.(q|o)_proj"},
    "gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


def lora_config(**config: Any) -> LoraConfig:
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4}
    return LoraConfig(**(defaults | config))


def made_by_peft(folder: Path, base: Path, dtype: torch.dtype, **config: Any) -> torch.Tensor:
    """Save a random adapter as PEFT does and return its logits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, lora_config(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator).to(dtype) * 0.2)
        logits = peft(IDS).logits
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    peft.save_pretrained(str(folder))
    return logits


@pytest.fixture(scope="module")
def base_bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    folder = tmp_path_factory.mktemp("base")
    bases = Bases(folder / "bases")
    bases.add(BASE, make_base(folder / "made"), origin="test")
    return bases


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_saves_is_pushed_pulled_and_gives_the_same_logits_in_peft(
    base_bases: Bases, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    base = base_bases.get(BASE)
    saved, pulled = tmp_path / "saved", tmp_path / "pulled"
    logits = made_by_peft(saved, base.path, dtype, **ADAPTERS[case])
    with Registry.open(tmp_path / "home", base_bases) as registry:
        with pytest.raises(Refused, match="--base ID"):
            registry.push(saved, NAME, actor="test")
        version = registry.push(saved, NAME, base=BASE, actor="test").version
        registry.pull(Selector.parse("acme/support@v1"), pulled)
        fetched = registry.fetch(version.ref)
    names = {path.name for path in fetched.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    for folder in (pulled, fetched):
        plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        with torch.no_grad():
            assert not torch.allclose(plain(IDS).logits, logits, atol=1e-4)
            loaded = PeftModel.from_pretrained(plain, folder)(IDS).logits
        assert torch.allclose(loaded, logits, atol=1e-6)


@pytest.mark.parametrize("case", ADAPTERS)
def test_rank_and_scale_of_every_module_are_those_peft_uses(
    base_bases: Bases, tmp_path: Path, case: str
) -> None:
    base = base_bases.get(BASE).path
    made_by_peft(tmp_path, base, torch.float32, **ADAPTERS[case])
    config = AdapterConfig.parse(json.loads((tmp_path / "adapter_config.json").read_text()))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    found = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    modules = sort_parts(load_file(tmp_path / "adapter_model.safetensors"))
    assert set(found) == set(modules)
    for module, (rank, scale) in found.items():
        assert config.rank(module) == rank
        assert config.scale(module) == pytest.approx(scale)
        assert config.targets(module)


PARTS = st.sampled_from(["model", "layers", "0", "1", "11", "self_attn", "q_proj", "k_proj", "q"])
MODULES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
KEYS = st.tuples(st.sampled_from(["", "^"]), MODULES).map("".join)


@given(patterns=st.lists(KEYS, max_size=6, unique=True), module=MODULES)
def test_the_first_matching_pattern_is_the_one_peft_finds(patterns: list[str], module: str) -> None:
    values = {key: index for index, key in enumerate(patterns)}
    assert first_match(values, module, -1) == values.get(get_pattern_key(patterns, module), -1)


@given(
    module=MODULES,
    targets=st.lists(MODULES, min_size=1, max_size=4),
    excludes=st.lists(MODULES, max_size=2),
    layers=st.lists(st.integers(0, 11), max_size=3),
    layers_pattern=st.sampled_from([None, "layers", ["blocks", "layers"], ["model.layers"]]),
)
def test_targeted_modules_are_those_peft_targets(
    module: str,
    targets: list[str],
    excludes: list[str],
    layers: list[int],
    layers_pattern: str | list[str] | None,
) -> None:
    raw = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": targets,
        "exclude_modules": excludes or None,
        "layers_to_transform": layers or None,
        "layers_pattern": layers_pattern if layers else None,
    }
    oracle = check_target_module_exists(LoraConfig(**{k: v for k, v in raw.items() if v}), module)
    assert AdapterConfig.parse(raw).targets(module) == bool(oracle)


def test_every_field_of_lora_config_is_known_here(tmp_path: Path) -> None:
    """A field that a newer peft writes shows up here before it shows up at a user."""
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    AdapterConfig.parse(saved)
    assert set(UNSUPPORTED) - set(saved) <= {"runtime_config"}


def test_raw_pissa_is_refused_and_its_conversion_is_accepted(
    base_bases: Bases, tmp_path: Path
) -> None:
    base = base_bases.get(BASE)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config)
    start = tmp_path / "start"
    config.init_lora_weights = True
    peft.save_pretrained(str(start))
    config.init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.mul_(1.5)
        logits = peft(IDS).logits
    raw, converted = tmp_path / "raw", tmp_path / "converted"
    peft.save_pretrained(str(raw))
    peft.save_pretrained(str(converted), path_initial_model_for_weight_conversion=str(start))
    with Registry.open(tmp_path / "home", base_bases) as registry:
        with pytest.raises(Refused, match="path_initial_model_for_weight_conversion"):
            registry.push(raw, NAME, base=BASE, actor="test")
        version = registry.push(converted, NAME, base=BASE, actor="test").version
        folder = registry.fetch(version.ref)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(
            PeftModel.from_pretrained(plain, folder)(IDS).logits, logits, atol=1e-4
        )
