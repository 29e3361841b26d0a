"""What is told while a run goes: trackers, the curve, and the noise that is only there then."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import training.arguments
from registry.base import BaseModel
from tests.training.test_train import bytes_of, run
from training.data.examples import Data
from training.errors import RecipeError
from training.recipe import Recipe, apply_overrides
from training.train import TrainedAdapter

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(trained: TrainedAdapter, key: str) -> list[float]:
    text = (trained.folder.parent / "metrics.jsonl").read_text()
    return [line[key] for line in map(json.loads, text.splitlines()) if key in line]


def test_tensorboard_is_told_every_loss_and_the_adapter_and_its_key_are_the_same(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = apply_overrides(recipe, ['report_to=["tensorboard"]'])
    assert told.digest == recipe.digest
    silent = run(recipe, data, tiny_base, tmp_path / "silent")
    watched = run(told, data, tiny_base, tmp_path / "watched")
    assert bytes_of(watched) == bytes_of(silent)
    assert watched.folder.parent.name == silent.folder.parent.name
    events = EventAccumulator(str(watched.folder.parent / "tensorboard")).Reload()
    scalars = [event.value for event in events.Scalars("train/loss")]
    assert scalars == pytest.approx(numbers(watched, "loss"), rel=1e-6)
    assert not (silent.folder.parent / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_named_before_the_first_step(
    recipe: Recipe,
    data: Data,
    tiny_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training.arguments, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install mlflow"):
        run(apply_overrides(recipe, ['report_to=["mlflow"]']), data, tiny_base, tmp_path)
    with pytest.raises(RecipeError, match="report_to"):
        apply_overrides(recipe, ['report_to=["printer"]'])


def test_the_curve_is_a_picture_of_both_losses_and_drawn_once(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    recipe = apply_overrides(recipe, ["train.steps=4", "train.eval_every=2"])
    data = replace(data, validation=data.held_out)
    trained = run(recipe, data, tiny_base, tmp_path)
    assert trained.curve is not None
    words = "".join(ET.parse(trained.curve).getroot().itertext())
    assert {"training", "validation", "step", "loss"} <= set(words.split())
    drawn = trained.curve.read_bytes()
    trained.curve.unlink()
    again = run(recipe, data, tiny_base, tmp_path)
    assert again.reused
    assert again.curve is not None
    assert again.curve.read_bytes() == drawn


def test_neftune_makes_noise_in_training_only_and_the_same_noise_each_time(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    settings = ["train.steps=3", "train.eval_every=1", "method.dropout=0.0"]
    data = replace(data, validation=data.held_out)
    # So small a rate that the weights stay what they are: what differs is the noise.
    still = apply_overrides(recipe, [*settings, "train.learning_rate=1e-12"])
    noisy = apply_overrides(still, ["train.neftune_alpha=20"])
    plain_run, noisy_run = (run(r, data, tiny_base, tmp_path) for r in (still, noisy))
    pairs = zip(numbers(plain_run, "loss"), numbers(noisy_run, "loss"), strict=True)
    assert all(abs(plain - noised) > 1e-3 for plain, noised in pairs)
    looks = numbers(plain_run, "validation_loss")
    assert numbers(noisy_run, "validation_loss") == pytest.approx(looks, abs=1e-6)
    learning = apply_overrides(recipe, [*settings, "train.neftune_alpha=20"])
    first, second = (run(learning, data, tiny_base, tmp_path / name) for name in ("a", "b"))
    assert bytes_of(first) == bytes_of(second)
