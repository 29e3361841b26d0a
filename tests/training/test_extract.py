"""A full fine-tune as a LoRA: at full rank it is the same model, and every rank tells its loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.store import Registry
from registry.validate import validate
from tests.tiny import make_base, peft_on_new_transformers, register
from training.errors import RunFailed
from training.extract import Extraction, FineTune, extract
from training.model import load_base
from training.train import TrainedAdapter
from training.whole import write_whole


def tuned(folder: Path, base: BaseModel, *, beside_linears: bool = False) -> Path:
    """Write a model whose linears (and perhaps all the rest) moved a little, and its card."""
    model = load_base(base.path, "float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if beside_linears or name.removesuffix(".weight") in base.linears:
                weight += 0.02 * torch.randn(weight.shape, generator=generator)
    write_whole(model, base, folder)
    card = {
        "kind": "full",
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        "recipe": {"name": "acme/x"},
    }
    (folder / "wardrobe.json").write_text(json.dumps(card))
    return folder


def extracted(
    folder: Path, base: BaseModel, runs: Path, rank: int | None = None, energy: float | None = None
) -> TrainedAdapter:
    source = replace(FineTune.in_folder(folder), version={"version": "acme/x@v1"})
    return extract(source, base, runs, Extraction.of(rank, energy), progress=lambda _: None)


def facts(made: TrainedAdapter) -> dict[str, Any]:
    return made.card["lineage"]["extracted"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).reshape(2, 20) * 5 % 250).logits


def test_at_full_rank_the_adapter_over_the_base_is_the_fine_tuned_model(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    made = extracted(folder, tiny_base, tmp_path / "runs", rank=256)
    with peft_on_new_transformers():
        worn = PeftModel.from_pretrained(load_base(tiny_base.path, "float32"), str(made.folder))
    expected = logits(load_base(folder, "float32"))
    assert (logits(load_base(tiny_base.path, "float32")) - expected).abs().max() > 0.1
    assert (logits(worn) - expected).abs().max() < 1e-4
    assert facts(made)["left_out"] == {"share": 0.0, "tensors": 0}
    assert made.card["kind"] == "full"
    assert made.card["gate"]["passed"] is False, "nobody may promote what was not evaluated"


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_weights_that_a_base_stores_the_other_way_round_are_extracted_all_the_same(
    tmp_path: Path,
) -> None:
    bases = Bases(tmp_path / "bases")
    base = register(make_base(tmp_path / "gpt2", arch="gpt2"), bases, "gpt2")
    folder = tuned(tmp_path / "tuned", base)
    made = extracted(folder, base, tmp_path / "runs", rank=256)
    with peft_on_new_transformers():
        worn = PeftModel.from_pretrained(load_base(base.path, "float32"), str(made.folder))
    expected = logits(load_base(folder, "float32"))
    assert (logits(load_base(base.path, "float32")) - expected).abs().max() > 0.1
    assert (logits(worn) - expected).abs().max() < 1e-4
    assert validate(made.folder, bases).rank > 0


def test_the_gate_takes_it_and_small_layers_have_a_rank_of_their_own(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    made = extracted(folder, tiny_base, tmp_path / "runs", rank=48)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (48, 48)
    small = {module for module in tiny_base.linears if module.endswith(("k_proj", "v_proj"))}
    assert config["rank_pattern"] == dict.fromkeys(small, 32), "these layers have 32 rows"
    assert config["alpha_pattern"] == config["rank_pattern"], "so the scale is 1 everywhere"
    checked = validate(made.folder, Bases(tiny_base.path.parent))
    assert (checked.rank, checked.warnings) == (48, ())


def test_a_higher_rank_keeps_more_and_an_energy_is_kept_by_the_smallest_rank(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    runs = tmp_path / "runs"
    kept = [facts(extracted(folder, tiny_base, runs, rank=rank))["kept"] for rank in (1, 4, 16, 64)]
    assert kept == sorted(set(kept))
    assert kept[-1] == 1.0
    made = extracted(folder, tiny_base, runs, energy=0.9)
    name = "model.layers.0.mlp.up_proj"
    change = (
        load_file(folder / "model.safetensors")[f"{name}.weight"]
        - load_base(tiny_base.path, "float32").state_dict()[f"{name}.weight"]
    )
    weights = load_file(made.folder / "adapter_model.safetensors")
    a, b = (weights[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")

    def lost(rank: int) -> float:
        return ((change - b[:, :rank] @ a[:rank]).norm() / change.norm()).item() ** 2

    assert lost(a.shape[0]) <= 0.1 < lost(a.shape[0] - 1)


def test_what_changed_outside_the_linears_is_left_out_and_told(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base, beside_linears=True)
    left_out = facts(extracted(folder, tiny_base, tmp_path / "runs", rank=8))["left_out"]
    after, before = load_file(folder / "model.safetensors"), load_file_of(tiny_base)
    energy = {name: (after[name] - before[name]).square().sum().item() for name in after}
    others = [name for name in after if name.removesuffix(".weight") not in tiny_base.linears]
    share = sum(energy[name] for name in others) / sum(energy.values())
    assert left_out == {"share": pytest.approx(share, abs=1e-4), "tensors": len(others)}


def load_file_of(base: BaseModel) -> dict[str, torch.Tensor]:
    return load_file(base.path / "model.safetensors")


def test_a_model_that_did_not_change_is_no_adapter(tiny_base: BaseModel, tmp_path: Path) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    save_file(load_file_of(tiny_base), folder / "model.safetensors")
    with pytest.raises(RunFailed, match="there is no adapter"):
        extracted(folder, tiny_base, tmp_path / "runs")


def test_the_same_extraction_is_found_again_and_says_what_it_was_made_of(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    first, again = (extracted(folder, tiny_base, tmp_path / "runs", rank=4) for _ in range(2))
    assert (first.reused, again) == (False, replace(first, reused=True))
    other = extracted(folder, tiny_base, tmp_path / "elsewhere", rank=4)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (other.folder / name).read_bytes() == (first.folder / name).read_bytes()
    assert facts(first)["of"]["version"] == "acme/x@v1"
    assert len(facts(first)["of"]["model_sha256"]) == 64


def test_a_version_is_extracted_like_its_run_and_an_adapter_is_not(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = tuned(tmp_path / "tuned", tiny_base)
    name = AdapterName.parse("acme/x")
    with Registry.open(tmp_path / "home", Bases(tiny_base.path.parent)) as registry:
        whole = registry.push(folder, name, actor="me").version
        found = FineTune.find("acme/x@v1", registry, tmp_path)
        assert (found.name, found.base_id) == (name, "local/tiny")
        assert found.version == {"version": "acme/x@v1", "digest": whole.digest}
        made = extract(found, tiny_base, tmp_path, Extraction.of(4, None), progress=lambda _: None)
        assert bytes_of(made) == bytes_of(extracted(folder, tiny_base, tmp_path / "runs", rank=4))
        assert registry.push(made.folder, name, actor="me").version.kind == "full"
        with pytest.raises(RunFailed, match=r"acme/x@v2 is no whole model"):
            FineTune.find("acme/x@v2", registry, tmp_path)


def bytes_of(made: TrainedAdapter) -> bytes:
    return (made.folder / "adapter_model.safetensors").read_bytes()


def test_a_folder_without_a_card_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"does not say recipe\.name and base\.id"):
        FineTune.in_folder(tmp_path)
