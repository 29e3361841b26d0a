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
from training.evaluation.evaluate import Answer, Ask, Variant, evaluate
from training.evaluation.gate import complete_card, decide
from training.evaluation.memory import remembered
from training.evaluation.metrics import Score, Verdict, score
from training.model import Hardware
from training.progress import Progress
from training.prompt import Prompter, load_prompter
from training.recipe import Gate, Recipe, apply_overrides
from training.train import train


def of(correct: int, total: int) -> Score:
    return score([Verdict(float(n < correct)) for n in range(total)], range(total))


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


def saying(prompter: Prompter, words: dict[Path | None, Sequence[str]]) -> Answer:
    """An answer function that says, for each adapter, these words in the order of its asks."""

    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        assert limit == 8
        said = {adapter: iter(answers) for adapter, answers in words.items()}
        done(len(asks))
        return [[*prompter.completion_ids(next(said[worn])), 65, 66] for _, worn in asks]

    return answer


def test_evaluation_asks_the_trained_prompt_judges_and_completes_the_card(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    worn = tmp_path / "worn"
    system = recipe.task.system
    shots = (("sky 1", "blue"),)
    variants = [
        Variant("a", tiny_base, system, worn),
        Variant("b", tiny_base, "Else.", None, shots),
    ]
    speaker = saying(prompter, {worn: ["Green.", "blue"], None: ["red", "blue"]})
    asked: list[Ask] = []

    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.extend(asks)
        return speaker(model, asks, limit, done)

    told: list[Progress] = []
    better, worse = evaluate(
        recipe, data.held_out, variants, prompter, answer, progress=told.append
    )
    assert asked[0] == (prompter.prompt_ids(data.held_out[0].turns), worn)
    of_b = prompter.tokenizer.decode(list(asked[2][0]))
    assert [part in of_b for part in ("Else.", "sky 1", "blue", "grass 10")] == [True] * 4
    assert system not in of_b
    assert [item.answer for item in better.items] == ["Green.", "blue"]
    assert (better.score.correct, worse.score.correct) == (2, 1)
    assert (told[-1].done, told[-1].total) == (4, 4)

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
    base = Variant("base", tiny_base, recipe.task.system)
    with pytest.raises(TrainingError, match="2 prompts were asked and 1 answers"):
        evaluate(
            recipe,
            data.held_out,
            [base],
            prompter,
            lambda m, a, n, d: [[1]],
            progress=lambda p: None,
        )


def test_models_are_asked_apart_and_answers_come_back_in_order(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    """A full fine-tune is another model: its prompts are in a batch of its own."""
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    full = replace(tiny_base, fingerprint="f" * 64)
    batches: list[int] = []

    def answer(
        model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        batches.append(len(asks))
        word = "green" if model == full else "blue"
        done(len(asks))
        return [list(prompter.completion_ids(word)) for _ in asks]

    variants = [Variant(str(n), m, "x") for n, m in enumerate([tiny_base, full, tiny_base])]
    told: list[Progress] = []
    found = evaluate(recipe, data.held_out, variants, prompter, answer, progress=told.append)
    assert [e.items[0].answer for e in found] == ["blue", "green", "blue"]
    assert sorted(batches) == [2, 4]
    assert told[-1].done == told[-1].total == 6


def test_a_base_answers_the_same_prompt_only_once(tiny_base: BaseModel, tmp_path: Path) -> None:
    asked: list[list[Ask]] = []

    def answer(
        model: BaseModel, asks: Sequence[Ask], tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.append(list(asks))
        done(len(asks))
        return [[len(ids), tokens, bool(worn)] for ids, worn in asks]

    once = remembered(tmp_path / "kept", tiny_base, answer)
    worn = tmp_path / "adapter"
    told: list[int] = []
    assert once(tiny_base, [((1,), None), ((1,), worn)], 4, told.append) == [[1, 4, 0], [1, 4, 1]]
    mixed: list[Ask] = [((1,), worn), ((1,), None), ((2, 3), None)]
    assert once(tiny_base, mixed, 4, told.append) == [[1, 4, 1], [1, 4, 0], [2, 4, 0]]
    assert asked[1] == [((1,), worn), ((2, 3), None)], "only what is new, in one batch"
    assert told[-2:] == [1, 3], "remembered answers count as done"
    assert once(tiny_base, mixed[1:], 4, told.append) == [[1, 4, 0], [2, 4, 0]]
    assert len(asked) == 2
    once(tiny_base, mixed[1:], 5, told.append)
    once(replace(tiny_base, fingerprint="0" * 64), mixed[1:], 4, told.append)
    assert len(asked) == 4, "other lengths and other weights are asked again"
