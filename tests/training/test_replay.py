from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from registry.base import BaseModel
from tests.tiny import EOS
from tests.training.answers import answer_with_transformers
from tests.training.test_train import FP32, bytes_of, quiet
from training.data.duplicates import nearest
from training.data.examples import Data, ask
from training.data.general import QUESTIONS
from training.errors import DataError, RecipeError
from training.evaluation.evaluate import Ask
from training.evaluation.general import load_general
from training.evaluation.memory import remembered
from training.prompt import load_prompter
from training.recipe import Recipe, apply_overrides
from training.replay import replay_rows
from training.rows import make_rows
from training.train import TrainedAdapter, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(recipe: Recipe, tmp_path: Path) -> Recipe:
    (tmp_path / "general.txt").write_text("How are you?\n\nWhat is tea?\n")
    recipe = replace(recipe, folder=tmp_path)
    return apply_overrides(
        recipe, [f"replay.source={tmp_path / 'general.txt'}", "replay.max_new_tokens=8"]
    )


def fixed(*answers: tuple[int, ...]) -> Callable[..., list[list[int]]]:
    def answer(
        model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        return [list(ids) for ids in answers]

    return answer


def run(recipe: Recipe, data: Data, base: BaseModel, runs: Path) -> TrainedAdapter:
    return train(
        recipe,
        data,
        base,
        runs,
        progress=quiet,
        show=quiet,
        hardware=FP32,
        answer=answer_with_transformers,
    )


def test_the_base_is_asked_under_its_own_system_prompt_and_its_answers_are_the_rows(
    recipe: Recipe, tiny_base: BaseModel
) -> None:
    said = (tuple(b"fine"), tuple(b"a hot dr"))
    rows = replay_rows(recipe, tiny_base, fixed(*said), quiet).samples
    decode = load_prompter(tiny_base.path, "").tokenizer.decode
    prompts = [decode(list(row.ids[: row.prompt_length])) for row in rows]
    assert prompts[1] == f"<|im_start|>user\nWhat is tea?{EOS}\n<|im_start|>assistant\n"
    answers = [decode(list(row.ids[row.prompt_length :])) for row in rows]
    assert answers == [f"fine{EOS}", "a hot dr"], "an answer that was cut does not teach to stop"
    brief = replay_rows(
        apply_overrides(recipe, ["replay.system=Be kind."]), tiny_base, fixed(*said), quiet
    )
    assert str(decode(list(brief.samples[0].ids))).startswith(f"<|im_start|>system\nBe kind.{EOS}")


def test_a_share_of_the_rows_is_the_bases_evenly_spread(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    recipe = apply_overrides(recipe, ["replay.share=0.125", "train.steps=10", "train.batch_size=8"])
    replayed = replay_rows(recipe, tiny_base, fixed(tuple(b"a"), tuple(b"b")), quiet)
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    schedule = make_rows(recipe, data, prompter, replayed).train
    groups = [schedule[index].example.group for index in range(len(schedule))]
    batches = [groups[start : start + 8] for start in range(0, 80, 8)]
    assert [batch.count("replay") for batch in batches] == [1] * 10


def test_replay_changes_the_adapter_the_same_way_each_time_and_the_base_is_asked_once(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    asked: list[int] = []

    def counting(
        model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        asked.append(len(asks))
        return answer_with_transformers(model, asks, max_new_tokens, done)

    answer = remembered(tmp_path / "answers", tiny_base, counting)
    more = {"progress": quiet, "show": quiet, "hardware": FP32, "answer": answer}
    first = train(recipe, data, tiny_base, tmp_path / "a", **more)
    second = train(recipe, data, tiny_base, tmp_path / "b", **more)
    plain = train(replace(recipe, replay=None), data, tiny_base, tmp_path / "a", **more)
    assert bytes_of(first) == bytes_of(second)
    assert bytes_of(first)[0] != bytes_of(plain)[0]
    assert asked == [2]
    assert first.card["lineage"]["replay_examples"] == 2
    assert "replay_examples" not in plain.card["lineage"]


def test_a_source_that_cannot_be_replayed_is_refused_by_name(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (tmp_path / "empty.txt").write_text("\n")
    for source, words in (
        ("bad.jsonl", "question"),
        ("empty.txt", "no question"),
        ("absent.txt", "replay.source"),
    ):
        with pytest.raises(DataError, match=words):
            replay_rows(
                apply_overrides(recipe, [f"replay.source={tmp_path / source}"]),
                tiny_base,
                fixed(),
                quiet,
            )
    long = apply_overrides(recipe, ["train.max_length=16"])
    with pytest.raises(DataError, match=r"replay\.max_new_tokens = 8"):
        replay_rows(long, tiny_base, fixed((1,), (2,)), quiet)
    with pytest.raises(RecipeError, match="answer"):
        replay_rows(recipe, tiny_base, None, quiet)


@pytest.mark.parametrize(
    "question", ["  GRASS 10 ", "what is sky", load_general().questions[0].question]
)
def test_a_source_that_asks_what_is_held_out_or_validates_or_measures_forgetting_is_refused(
    question: str, recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    data = replace(data, validation=(ask("What is  sky", "blue", "v"),))
    (tmp_path / "general.txt").write_text(f"How are you?\n{question}\n")
    with pytest.raises(DataError, match="which is held out, validates, or measures forgetting"):
        run(recipe, data, tiny_base, tmp_path / "runs")


def test_our_own_questions_are_different_short_questions() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 60
    assert max(map(len, QUESTIONS)) < 80


def test_no_replayed_question_is_near_one_that_measures_forgetting() -> None:
    asked = [question.question for question in load_general().questions]
    near = nearest(QUESTIONS, asked)
    assert len(near) == len(QUESTIONS)
    assert max(near) < 0.5
    assert nearest([asked[0]], asked) == [1.0], "the measure sees an equal one"
