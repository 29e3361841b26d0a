"""Every method through the one training path: deterministic, resumable, true to what it trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import training.train as training_run
from registry.base import BaseModel, Bases
from registry.tensors import read_folder
from registry.validate import validate
from tests.tiny import make_base, peft_on_new_transformers
from training import conversion
from training.conversion import Conversion
from training.data.examples import Data
from training.errors import RunFailed
from training.model import Hardware, load_base, load_model
from training.progress import Progress
from training.recipe import METHOD_KEYS, Method, Recipe, apply_overrides
from training.results import NOT_LOW_RANK
from training.train import TrainedAdapter, train

FP32 = Hardware("cpu", "float32", 1)
BF16 = Hardware("cpu", "bfloat16", 1)
ELSEWHERE = ("qlora", "fewshot", "base")  # not trained here, or not at all
KINDS = [kind for kind in METHOD_KEYS if kind not in ELSEWHERE]
SLOW = ("rslora", "olora", "loha", "lokr")  # each takes the path of another one: lora, pissa, dora
LORA_KINDS = [kind for kind in KINDS if kind not in (*NOT_LOW_RANK, "full")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of_kind(recipe: Recipe, kind: str, *more: str) -> Recipe:
    short = ["train.steps=5", "train.save_every=2", f"method.kind={kind}"]
    return apply_overrides(recipe, [*short, *more])


def run(recipe: Recipe, data: Data, base: BaseModel, runs: Path, **more: Any) -> TrainedAdapter:
    said = {"progress": lambda _: None, "show": lambda _: None, "hardware": FP32} | more
    return train(recipe, data, base, runs, **said)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    ids = torch.arange(40).reshape(2, 20) * 5 % 250
    with torch.no_grad():
        # Virtual tokens stand before the others.
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -20:].float()


def with_adapter(folder: Path, base: BaseModel) -> Any:
    """Return PEFT's own reading of an adapter over the untouched base."""
    with peft_on_new_transformers():
        return PeftModel.from_pretrained(load_base(base.path, "float32"), str(folder))


@pytest.fixture
def trained_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the model of every run as it is when its last step is done."""
    kept: list[Any] = []
    write = training_run.write_result

    def keep(model: Any, *rest: Any) -> Any:
        kept.append(model)
        return write(model, *rest)

    monkeypatch.setattr(training_run, "write_result", keep)
    return kept


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.long) if k in SLOW else k for k in KINDS]
)
def test_a_run_of_every_method_continues_to_the_same_bytes(
    kind: str, recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    recipe = of_kind(recipe, kind)
    unbroken = run(recipe, data, tiny_base, tmp_path / "unbroken")

    def die_at_three(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tiny_base, tmp_path / "broken", progress=die_at_three)
    done: list[int] = []
    resumed = run(
        recipe, data, tiny_base, tmp_path / "broken", progress=lambda p: done.append(p.done)
    )
    assert done == [2, 3, 4, 5]
    names = {path.name for path in unbroken.folder.iterdir()} - {"wardrobe.json"}
    assert names & {"adapter_model.safetensors", "model.safetensors"}
    for name in names:
        assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


@pytest.mark.parametrize("kind", [*LORA_KINDS, *NOT_LOW_RANK])
def test_what_is_saved_answers_like_what_was_trained(
    kind: str,
    recipe: Recipe,
    data: Data,
    tiny_base: BaseModel,
    tmp_path: Path,
    trained_models: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conversion, "ENERGY", 1.0)  # so that SVD loses nothing at full rank
    before = {p.name: p.read_bytes() for p in tiny_base.path.iterdir()}
    trained = run(of_kind(recipe, kind), data, tiny_base, tmp_path)
    expected, saved = logits(trained_models[0]), logits(with_adapter(trained.folder, tiny_base))
    plain = logits(load_base(tiny_base.path, "float32"))
    effect = (expected - plain).abs().max()
    assert effect > 0.05, "it must have learned something"
    assert (saved - expected).abs().max() < 1e-4
    assert {p.name: p.read_bytes() for p in tiny_base.path.iterdir()} == before
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "local/tiny"
    assert str(tmp_path) not in json.dumps(config)
    checked = validate(trained.folder, Bases(tiny_base.path.parent))
    assert checked.warnings == ()
    assert kind not in ("pissa", "olora") or checked.rank == 2 * recipe.method.r


def test_qlora_is_refused_before_anything_starts_where_it_cannot_run(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(RunFailed, match=r"a CUDA device and the package bitsandbytes.*'lora'"):
        run(of_kind(recipe, "qlora"), data, tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_fine_tune_is_a_model_folder_in_fp32_with_the_bases_own_files(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path, trained_models: list[Any]
) -> None:
    folder = run(of_kind(recipe, "full"), data, tiny_base, tmp_path, hardware=BF16).folder
    trained, read = trained_models[0].state_dict(), load_base(folder, "float32").state_dict()
    assert all(read[name].equal(trained[name]) for name in trained)
    assert any(not w.equal(w.bfloat16().float()) for w in trained.values()), "masters are fp32"
    tensors = read_folder(folder)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in read_folder(tiny_base.path).items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}
    assert (folder / "config.json").read_bytes() == (tiny_base.path / "config.json").read_bytes()
    assert json.loads((folder / "wardrobe.json").read_text())["kind"] == "full"
    assert validate(folder, Bases(tiny_base.path.parent)).warnings == ()


def test_a_base_that_could_not_be_written_whole_is_refused_before_it_is_trained(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base", layers=1)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"head.weight": torch.zeros(2)}, file, metadata={"format": "pt"})
    assert load_model(base, Method(), FP32, 0, [])
    with pytest.raises(RunFailed, match=r"no 'head\.weight' in memory.*'lora'"):
        load_model(base, Method(kind="full"), FP32, 0, [])


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_what_a_conversion_loses_is_measured_and_named_above_the_bound(
    kind: str,
    recipe: Recipe,
    data: Data,
    tiny_base: BaseModel,
    tmp_path: Path,
    trained_models: list[Any],
) -> None:
    good = run(of_kind(recipe, kind), data, tiny_base, tmp_path)
    poor = run(of_kind(recipe, kind, "method.max_rank=1"), data, tiny_base, tmp_path)
    kept, lost = (Conversion(**r.card["lineage"]["conversion"]) for r in (good, poor))
    assert (kept.failures, lost.highest_rank) == ([], 1)
    assert kept.relative_error <= 0.032
    assert "method.max_rank" in lost.failures[0]
    trained = change(trained_models[1], tiny_base)
    error = (change(with_adapter(poor.folder, tiny_base), tiny_base) - trained).norm()
    assert lost.relative_error == pytest.approx((error / trained.norm()).item(), rel=1e-3)


def change(model: Any, base: BaseModel) -> torch.Tensor:
    """Return how PEFT's own merge changes the base's weights, all in one vector."""
    merged = model.merge_and_unload().state_dict()
    before = load_base(base.path, "float32").state_dict()
    return torch.cat([(merged[name] - before[name]).flatten() for name in sorted(before)])
