import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.base import BaseModel
from training.batches import MaskedSample
from training.data.examples import Data
from training.errors import TrainingError
from training.evaluation.evaluate import complete_card, decide, evaluate, remembered
from training.evaluation.metrics import Score, Verdict, score
from training.model import Hardware
from training.progress import Progress
from training.prompt import load_prompter
from training.recipe import Gate, Recipe, apply_overrides
from training.train import train


def of(correct: int, total: int) -> Score:
    return score([Verdict(number < correct) for number in range(total)])


@pytest.mark.parametrize(
    ("gate", "adapter", "base", "failures"),
    [
        (Gate(), of(0, 10), None, 0),
        (Gate(min_value=0.5), of(5, 10), None, 0),
        (Gate(min_value=0.5), of(4, 10), None, 1),
        (Gate(min_gain=0.4), of(5, 10), of(1, 10), 0),
        (Gate(min_gain=0.4), of(5, 10), of(2, 10), 1),
        (Gate(min_gain=0.4), of(10, 10), None, 1),
        (Gate(min_value=0.9, min_gain=0.9), of(5, 10), of(5, 10), 2),
    ],
)
def test_the_gate_names_every_threshold_that_is_missed(
    gate: Gate, adapter: Score, base: Score | None, failures: int
) -> None:
    decision = decide(gate, adapter, base)
    assert len(decision.failures) == failures
    assert decision.passed == (failures == 0)


def test_evaluation_asks_the_trained_prompt_judges_and_completes_the_card(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    seen: list[tuple[int, ...]] = []

    def speaker(words: Sequence[str]) -> Callable[..., list[list[int]]]:
        def generate(
            prompts: Sequence[tuple[int, ...]], limit: int, done: Callable[[int], None]
        ) -> list[list[int]]:
            assert limit == 8
            seen.extend(prompts)
            done(len(prompts))
            return [[*prompter.completion_ids(word), 65, 66] for word in words]

        return generate

    told: list[Progress] = []
    better = evaluate(
        recipe, data.held_out, prompter, speaker(["Green.", "blue"]), progress=told.append
    )
    worse = evaluate(
        recipe, data.held_out, prompter, speaker(["red", "blue"]), progress=told.append
    )
    assert seen[0] == prompter.prompt_ids(data.held_out[0].turns)
    assert [item.answer for item in better.items] == ["Green.", "blue"]
    assert (better.score.correct, worse.score.correct) == (2, 1)
    assert (told[-1].done, told[-1].total) == (2, 2)

    shown: list[MaskedSample] = []
    short = apply_overrides(recipe, ["train.steps=1"])
    trained = train(
        short,
        data,
        tiny_base,
        tmp_path,
        progress=told.append,
        show=shown.append,
        hardware=Hardware("cpu", "float32", 1),
    )
    assert [sample.learned for sample in shown] == [f"{data.train[0].completion}<|im_end|>"]
    done = complete_card(trained, short, better, worse)
    card = json.loads((trained.folder / "wardrobe.json").read_text())
    assert card == done.card
    assert card["gate"] == {
        "passed": True,
        "failures": [],
        "rules": {"min_value": None, "min_gain": 0.3},
    }
    assert card["metrics"]["gain"] == 0.5
    assert card["metrics"]["adapter"]["low"] == pytest.approx(0.3424, abs=1e-4)

    def again(recipe: Recipe) -> dict[str, Any]:
        hardware = Hardware("cpu", "float32", 1)
        found = train(
            recipe,
            data,
            tiny_base,
            tmp_path,
            progress=told.append,
            show=shown.append,
            hardware=hardware,
        )
        assert found.reused
        return found.card

    assert again(short) == card
    stricter = again(apply_overrides(short, ["gate.min_gain=0.9"]))
    assert stricter["metrics"] == {}, "another gate needs another verdict"
    assert stricter["gate"]["passed"] is False
    lines = (trained.folder.parent / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["base"]["correct"] for line in lines] == [False, True]


def test_answers_that_went_missing_are_no_result(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    with pytest.raises(TrainingError, match="2 prompts were asked and 1 answers"):
        evaluate(recipe, data.held_out, prompter, lambda p, n, d: [[1]], progress=lambda p: None)


def test_a_base_answers_the_same_prompts_only_once(tiny_base: BaseModel, tmp_path: Path) -> None:
    asked: list[int] = []

    def generate(
        prompts: Sequence[tuple[int, ...]], tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.append(tokens)
        return [[len(ids), tokens] for ids in prompts]

    once = remembered(tmp_path, tiny_base, generate)
    told: list[int] = []
    assert once([(1,), (2, 3)], 4, told.append) == [[1, 4], [2, 4]]
    assert once([(1,), (2, 3)], 4, told.append) == [[1, 4], [2, 4]]
    assert (asked, told) == ([4], [2])
    once([(1,), (2, 3)], 5, told.append)
    other = replace(tiny_base, fingerprint="0" * 64)
    remembered(tmp_path, other, generate)([(1,), (2, 3)], 4, told.append)
    assert asked == [4, 5, 4], "other lengths and other weights are asked again"
