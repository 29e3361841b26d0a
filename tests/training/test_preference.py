import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import training.preference
from registry.base import BaseModel
from tests.tiny import peft_on_new_transformers
from tests.training.test_train import FP32, bytes_of, run
from training.data.examples import Data, ask
from training.errors import DataError, RecipeError
from training.preference import Pair, read_pairs
from training.progress import Progress
from training.prompt import load_prompter
from training.recipe import Recipe, apply_overrides
from training.replay import Replayed
from training.rows import make_rows
from training.train import run_facts

pytest.importorskip("trl", reason="the extra dpo")
pytestmark = pytest.mark.usefixtures("one_thread")


def write_pairs(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(recipe: Recipe, tmp_path: Path) -> Recipe:
    rows = [{"prompt": f"leaf {n}", "chosen": "green", "rejected": "blue"} for n in range(6)]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    recipe = replace(recipe, folder=tmp_path)
    return apply_overrides(
        recipe, [f"preference.path={tmp_path / 'pairs.jsonl'}", "train.learning_rate=3e-3"]
    )


def log_odds(recipe: Recipe, data: Data, base: BaseModel, adapter: Path | None) -> float:
    """Return log p(chosen) − log p(rejected), the mean over the pairs, by PEFT itself."""
    assert recipe.preference is not None
    prompter = load_prompter(base.path, recipe.task.system)
    pairs = read_pairs(recipe, recipe.preference, data, prompter).pairs
    model: Any = AutoModelForCausalLM.from_pretrained(base.path)
    if adapter:
        with peft_on_new_transformers():
            model = PeftModel.from_pretrained(model, str(adapter))
    return sum(_log_odds(model.eval(), pair) for pair in pairs) / len(pairs)


def _log_odds(model: Any, pair: Pair) -> float:
    values = []
    for sample in (pair.chosen, pair.rejected):
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        told = logs.gather(1, ids[0, 1:, None])[sample.prompt_length - 1 :]
        values.append(float(told.sum()))
    return values[0] - values[1]


def test_the_margin_grows_from_zero_and_is_what_the_adapter_adds_to_the_base(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    trained = run(recipe, data, tiny_base, tmp_path / "runs")
    text = (trained.folder.parent / "metrics.jsonl").read_text()
    margins = [json.loads(line)["margin"] for line in text.splitlines()]
    assert margins[0] == 0, "a fresh adapter is the base, and the base is the reference"
    assert margins[-1] > margins[3] > 0
    before = log_odds(recipe, data, tiny_base, None)
    after = log_odds(recipe, data, tiny_base, trained.folder)
    assert recipe.preference is not None
    # The last line is of the weights before the last step, whose learning rate is nearly nothing.
    assert recipe.preference.beta * (after - before) == pytest.approx(margins[-1], rel=0.2)
    assert trained.card["lineage"]["pairs"] == 6
    assert [p.name for p in sorted(trained.folder.iterdir())] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "wardrobe.json",
    ]


def test_a_preference_run_that_dies_continues_to_the_same_bytes(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    unbroken = run(recipe, data, tiny_base, tmp_path / "unbroken")

    def die_at_six(told: Progress) -> None:
        if told.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tiny_base, tmp_path / "broken", progress=die_at_six)
    assert bytes_of(run(recipe, data, tiny_base, tmp_path / "broken")) == bytes_of(unbroken)
    other = apply_overrides(recipe, ["preference.beta=0.5"])
    assert bytes_of(run(other, data, tiny_base, tmp_path / "unbroken"))[0] != bytes_of(unbroken)[0]


def test_pairs_that_cannot_be_used_are_named(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    good = {"prompt": "leaf", "chosen": "green", "rejected": "blue"}
    data = replace(data, validation=(ask("Sky", "blue", "v"),))
    for bad, words in (
        ({"prompt": "leaf", "chosen": "green"}, "Line 2.*rejected"),
        (good | {"prompt": "grass 10"}, "Line 2.*held out"),
        (good | {"prompt": "Grass  11 "}, "Line 2.*held out"),
        (good | {"prompt": "sky"}, "Line 2.*validates"),
        (good | {"rejected": "x" * 300}, r"Line 2.*train\.max_length"),
    ):
        write_pairs(tmp_path / "pairs.jsonl", [good, bad])
        with pytest.raises(DataError, match=words):
            run(recipe, data, tiny_base, tmp_path / "runs")
    (tmp_path / "pairs.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="Line 1"):
        run(recipe, data, tiny_base, tmp_path / "runs")


def test_a_run_of_pairs_depends_on_the_version_of_trl(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    rows = make_rows(recipe, data, prompter, Replayed((), {}))
    facts = run_facts(recipe, data, tiny_base, FP32, rows)
    assert facts["versions"]["trl"] == version("trl")
    plain = replace(recipe, preference=None)
    assert "trl" not in run_facts(plain, data, tiny_base, FP32, rows)["versions"]


def test_a_missing_extra_and_keys_that_do_nothing_here_are_refused(
    recipe: Recipe,
    data: Data,
    tiny_base: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RecipeError, match=r"\[replay\].*\[preference\]"):
        apply_overrides(recipe, ["replay.share=0.1"])
    monkeypatch.setattr(training.preference, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"wardrobe\[dpo\]"):
        run(recipe, data, tiny_base, tmp_path / "runs")
