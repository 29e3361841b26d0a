import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import training.train
from registry.base import BaseModel
from tests.tiny import peft_on_new_transformers
from tests.training.test_train import bytes_of, run
from training.batches import collate, encode_examples
from training.data.examples import Data, ask, digest_examples
from training.errors import RecipeError
from training.prompt import load_prompter
from training.recipe import Recipe, apply_overrides
from training.train import TrainedAdapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(data: Data) -> Data:
    """What validates says the opposite of what trains, so that learning soon makes it worse."""
    opposite = tuple(ask(f"grass {n}", "blue" if n % 2 else "green", "v") for n in range(20, 23))
    return replace(data, validation=opposite)


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return apply_overrides(
        recipe, ["train.steps=40", "train.eval_every=3", "train.patience=2", "train.save_every=4"]
    )


def lines_of(trained: TrainedAdapter) -> list[dict[str, Any]]:
    text = (trained.folder.parent / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def loss_of(folder: Path, recipe: Recipe, data: Data, base: BaseModel) -> float:
    """Measure the validation loss of what was written with PEFT itself, in batches of two."""
    prompter = load_prompter(base.path, recipe.task.system)
    samples, _ = encode_examples(data.validation, prompter, recipe.train)
    whole = (folder / "model.safetensors").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(folder if whole else base.path)
    if not whole:
        with peft_on_new_transformers():
            model = PeftModel.from_pretrained(model, str(folder))
    model.eval()
    parts = [samples[i : i + 2] for i in range(0, len(samples), 2)]
    with torch.no_grad():
        losses = [float(model(**collate(part, prompter.end_of_turn)).loss) for part in parts]
    return sum(loss * len(part) for loss, part in zip(losses, parts, strict=True)) / len(samples)


def test_a_run_stops_when_the_validation_loss_is_no_better_and_keeps_the_best_weights(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    trained = run(recipe, data, tiny_base, tmp_path)
    looks = [line for line in lines_of(trained) if "validation_loss" in line]
    losses = [line["validation_loss"] for line in looks]
    best = losses.index(min(losses))
    lineage = trained.card["lineage"]
    assert len(losses) == best + 1 + 2, "two looks without a better loss, then the end"
    assert lineage["best_step"] == looks[best]["step"]
    assert lineage["steps"] == looks[-1]["step"] < 40
    assert lineage["validation_loss"] == losses[best] < losses[-1]
    assert loss_of(trained.folder, recipe, data, tiny_base) == pytest.approx(losses[best], abs=2e-5)


@pytest.mark.parametrize(
    ("kind", "rate"), [("full", 0.01), ("pissa", 0.01), ("prompt-tuning", 0.05)]
)
def test_every_kind_of_weights_is_the_best_again_at_the_end(
    kind: str, rate: float, recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    recipe = apply_overrides(
        recipe, [f"method.kind={kind}", f"train.learning_rate={rate}", "train.steps=60"]
    )
    trained = run(recipe, data, tiny_base, tmp_path)
    lineage = trained.card["lineage"]
    assert lineage["best_step"] < lineage["steps"]
    best = lineage["validation_loss"]
    assert loss_of(trained.folder, recipe, data, tiny_base) == pytest.approx(best, abs=1e-4)


def test_a_look_alone_neither_stops_a_run_nor_keeps_other_weights_than_the_last(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    looking = replace(recipe, train=replace(recipe.train, patience=None, steps=10))
    trained = run(looking, data, tiny_base, tmp_path)
    looks = [line for line in lines_of(trained) if "validation_loss" in line]
    assert [line["step"] for line in looks] == [3, 6, 9, 10]
    assert trained.card["lineage"]["best_step"] is None
    last = looks[-1]["validation_loss"]
    assert loss_of(trained.folder, recipe, data, tiny_base) == pytest.approx(last, abs=2e-5)


def test_a_run_that_ended_early_and_died_before_it_was_written_ends_with_the_same_bytes(
    recipe: Recipe,
    data: Data,
    tiny_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unbroken = run(recipe, data, tiny_base, tmp_path / "unbroken")

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.train, "write_result", die)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, data, tiny_base, tmp_path / "broken")
    resumed = run(recipe, data, tiny_base, tmp_path / "broken")
    assert bytes_of(resumed) == bytes_of(unbroken)
    steps = [line["step"] for line in lines_of(resumed) if "loss" in line]
    assert steps == [line["step"] for line in lines_of(unbroken) if "loss" in line]


def test_early_stopping_without_examples_to_look_at_is_refused_by_name(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    none = Data(data.train, data.held_out, 0, digest_examples(data.train, data.held_out))
    with pytest.raises(RecipeError, match=r"train\.eval_every = 3.*data\.validation"):
        run(recipe, none, tiny_base, tmp_path)
