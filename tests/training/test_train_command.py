"""What the commands of training say and refuse, with a base that answers at once."""

import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import wardrobe
from registry.adapter import AdapterName
from registry.base import BaseModel
from registry.errors import WardrobeError
from tests.training.test_train import quiet
from training.card import write_card
from training.commands.train import push_trained, unwritten_weights
from training.commands.versions import unjudged_for
from training.data.examples import Data
from training.errors import RunFailed
from training.evaluation.evaluate import Ask
from training.fewshot.version import make_prompt
from training.recipe import Recipe, apply_overrides
from training.train import TrainedAdapter

RECIPE = """
name = "acme/{kind}"
base = "local/tiny"
[data]
path = "rows.csv"
[task]
system = "Say the colour."
metric = "label"
[method]
kind = "{kind}"
[fewshot]
k = [0, 1]
choose = "nearest"
labels = false
"""


def say_nothing(model: BaseModel, asks: Sequence[Ask], *rest: object) -> list[list[int]]:
    return [[] for _ in asks]


class Silent:
    """Engines that answer nothing."""

    def answer(self, model: BaseModel, asks: Sequence[Ask], *rest: object) -> list[list[int]]:
        return say_nothing(model, asks)

    def close(self) -> None:
        pass


@pytest.fixture
def folders(tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recipes that train nothing: one that is only measured, and the bare base."""
    monkeypatch.setenv("WARDROBE_CACHE", str(tiny_base.path.parents[1]))
    monkeypatch.setenv("WARDROBE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(wardrobe, "offline_engines", Silent)
    words = ("river", "castle", "violin", "tomato", "glacier", "lantern", "bicycle", "harbour")
    for kind in ("fewshot", "base"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "recipe.toml").write_text(RECIPE.format(kind=kind))
        rows = [f"{word},{'blue' if n % 2 else 'green'}" for n, word in enumerate(words)]
        (tmp_path / kind / "rows.csv").write_text("\n".join(["prompt,completion", *rows]))
    return [str(tmp_path / "fewshot"), str(tmp_path / "base")]


def test_a_recipe_that_is_only_measured_does_not_end_those_after_it(folders: list[str]) -> None:
    done = CliRunner().invoke(wardrobe.app, ["train", *folders])
    assert done.exit_code == 0, done.output
    assert "measured only" in done.output
    assert "acme/base: label on held-out groups" in done.output


def test_what_is_only_measured_leaves_no_folder_to_copy(folders: list[str], tmp_path: Path) -> None:
    asked = ["train", folders[0], "--out", str(tmp_path / "copy")]
    done = CliRunner().invoke(wardrobe.app, asked)
    assert done.exit_code == 2
    assert "acme/fewshot is only measured" in done.output


@pytest.fixture
def prompt(recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path) -> TrainedAdapter:
    bare = apply_overrides(recipe, ["method.kind=base"])
    return make_prompt(bare, data, tiny_base, tmp_path, answer=say_nothing, progress=quiet)


def test_a_card_that_the_store_does_not_take_is_told(
    folders: list[str],
    prompt: TrainedAdapter,
    tiny_base: BaseModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = AdapterName.parse("acme/base")
    push_trained(name, tiny_base, prompt, None, alias=None)
    assert "card" not in capsys.readouterr().out
    card = prompt.card | {"metrics": {"forgetting": {}}}
    write_card(prompt.folder, card)
    push_trained(name, tiny_base, replace(prompt, card=card), None, alias=None)
    assert "its card was kept, this one was not" in capsys.readouterr().out


def test_a_verdict_is_of_the_recipe_that_was_given_and_of_the_prompt_that_is_served(
    recipe: Recipe, prompt: TrainedAdapter
) -> None:
    judged = replace(prompt, card=prompt.card | {"metrics": {"metric": "exact"}})
    assert unjudged_for(recipe, judged).card["metrics"] == {}
    with pytest.raises(WardrobeError, match="system prompt 'Be brief'"):
        unjudged_for(apply_overrides(recipe, ["task.system=Be brief"]), judged)


def test_a_disk_without_room_for_weights_is_a_sentence_and_not_a_traceback(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # of a file; the nearest to a full disk
    try:
        with (
            pytest.raises(RunFailed, match=r"cannot be written.*the same command goes on"),
            unwritten_weights(tmp_path),
        ):
            save_file({"a": np.zeros(1 << 20, np.float32)}, tmp_path / "weights.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
