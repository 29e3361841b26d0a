from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest

from training.errors import RecipeError
from training.recipe import (
    METHOD_KEYS,
    Method,
    MethodKind,
    Recipe,
    apply_overrides,
    load_recipe,
    parse_recipe,
)


def minimal() -> dict[str, Any]:
    return {
        "name": "acme/support",
        "base": "local/tiny",
        "data": {"path": "rows.csv"},
        "task": {"system": "Answer.", "metric": "exact"},
        "train": {"steps": 10},
    }


def parsed(**changes: Any) -> Recipe:
    return parse_recipe(minimal() | changes, Path("/recipes/support"))


def test_a_minimal_recipe_gets_the_documented_defaults() -> None:
    recipe = parsed()
    assert (recipe.method.r, recipe.method.alpha, recipe.method.targets) == (16, 32, "all-linear")
    assert (recipe.train.batch_size, recipe.train.learning_rate) == (8, 1e-3)
    assert recipe.gate.min_gain is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stpes": 1}, ["stpes", "train", "seed"]),
        ({"train": {"steps": 1, "lr": 0.1}}, ["train.lr", "learning_rate"]),
        ({"method": {"rank": 8}}, ["method.rank", "alpha"]),
        ({"data": {"path": "x.csv", "hub": {"repo": "a/b", "file": "c"}}}, ["data.hub.file"]),
        ({"folder": "/etc"}, ["folder"]),
        ({"train": {"steps": "many"}}, ["int", "train.steps"]),
        ({"train": {"steps": 0}}, [">= 1", "train.steps"]),
        ({"train": {}}, ["steps"]),
        ({"train": {"steps": 5, "learning_rate": 0.0}}, ["learning_rate"]),
        ({"method": {"r": 512}}, ["<= 256", "method.r"]),
        ({"method": {"kind": "lroa"}}, ["lroa", "method.kind"]),
        ({"method": {"kind": "full", "r": 8}}, ["method.r", "'full'", "no other key"]),
        ({"method": {"kind": "loha", "dropout": 0.1}}, ["method.dropout", "r, alpha, targets"]),
        ({"method": {"tokens": 8}}, ["method.tokens", "'lora'"]),
        ({"method": {"use_rslora": True}}, ["method.use_rslora"]),
        ({"method": {"dropout": 1.0}}, ["dropout"]),
        ({"task": {"system": "x", "metric": "bleu"}}, ["bleu", "metric"]),
        ({"gate": {"min_gain": 40}}, ["gate.min_gain"]),
        ({"seed": -1}, ["seed"]),
        ({"data": {}}, ["exactly one source"]),
        ({"method": "lora"}, ["$.method", "object"]),
        ({"method": {"kind": "fewshot"}, "replay": {}}, ["[replay] does nothing", "'fewshot'"]),
        ({"data": {"builder": "icd-10-chapters", "path": "x.csv"}}, ["exactly one source"]),
        ({"name": "Acme/Support"}, ["Acme", "a-z"]),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as refusal:
        parsed(**changes)
    assert [word for word in words if word not in refusal.value.message] == []


def test_an_override_sets_one_key_and_is_checked_like_the_file() -> None:
    recipe = apply_overrides(
        parsed(), ["train.steps=20", "task.system=Be brief.", "method.targets=['q_proj']"]
    )
    assert recipe.train.steps == 20
    assert recipe.task.system == "Be brief."
    assert recipe.method.targets == ("q_proj",)
    assert recipe.train.batch_size == parsed().train.batch_size
    with pytest.raises(RecipeError, match=r"train\.stpes"):
        apply_overrides(parsed(), ["train.stpes=20"])
    with pytest.raises(RecipeError, match=r"train\.steps"):
        apply_overrides(parsed(), ["train.steps=few"])
    with pytest.raises(RecipeError, match="key=value"):
        apply_overrides(parsed(), ["train.steps"])
    with pytest.raises(RecipeError, match="no key of a recipe"):
        apply_overrides(parsed(), ["name.first=x"])


def test_another_kind_keeps_the_keys_it_uses_and_refuses_what_it_does_not() -> None:
    lora = parsed(method={"r": 8, "dropout": 0.1})
    dora = apply_overrides(lora, ["method.alpha=4", "method.kind=dora"]).method
    assert dora.settings == {
        "kind": "dora",
        "r": 8,
        "alpha": 4,
        "dropout": 0.1,
        "targets": "all-linear",
        "max_rank": 64,
    }
    assert apply_overrides(lora, ["method.kind=full"]).method.settings == {"kind": "full"}
    with pytest.raises(RecipeError, match=r"method\.alpha does nothing"):
        apply_overrides(lora, ["method.alpha=4", "method.kind=full"])
    with pytest.raises(RecipeError, match=r"method\.kind"):
        apply_overrides(lora, ["method.kind=lroa"])
    assert apply_overrides(parsed(replay={}), ["method.kind=base"]).replay is None
    with pytest.raises(RecipeError, match=r"\[replay\] does nothing"):
        apply_overrides(parsed(), ["method.kind=base", "replay.share=0.1"])


def test_every_kind_says_which_keys_it_uses_and_no_key_is_without_a_kind() -> None:
    assert set(METHOD_KEYS) == set(get_args(MethodKind))
    keys = {field.name for field in fields(Method)} - {"kind"}
    assert keys == {key for used in METHOD_KEYS.values() for key in used}


def test_a_data_path_is_relative_to_the_recipe_and_an_override_to_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = apply_overrides(parsed(), ["data.path=mine.csv"])
    assert recipe.data.path == str(tmp_path / "mine.csv")
    assert parsed().data.path == "rows.csv"
    for text, source in (("mine.txt", str(tmp_path / "mine.txt")), ("general", "general")):
        replay = apply_overrides(parsed(), [f"replay.source={text}"]).replay
        assert replay is not None
        assert replay.source == source


def test_the_digest_sees_every_setting_and_no_place() -> None:
    assert parsed().digest == parse_recipe(minimal(), Path("/elsewhere")).digest
    assert parsed().digest == parsed(data={"path": "/abs/rows.csv"}).digest
    assert parsed(replay={}).digest == parsed(replay={"source": "mine.txt"}).digest
    assert parsed().digest != apply_overrides(parsed(), ["train.steps=11"]).digest
    assert parsed().digest != apply_overrides(parsed(), ["gate.min_gain=0.1"]).digest


def test_a_missing_or_broken_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        load_recipe(tmp_path)
    (tmp_path / "recipe.toml").write_text("name = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path)
