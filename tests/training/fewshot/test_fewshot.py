"""A recipe's prompt: measured on the right side, chosen by its mean, found again, never leaking."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.store import Registry
from serving.prompt import put_before
from serving.tokens import ChatMessage, Tokens
from training.data.examples import Data, ask, digest_examples
from training.errors import RecipeError
from training.evaluation.evaluate import Ask, Variant
from training.evaluation.memory import remembered
from training.fewshot.measure import Cell, Measurement, cells_of, choose, in_portions, measure
from training.fewshot.version import make_prompt
from training.progress import Progress
from training.prompt import load_prompter
from training.recipe import FewShot, Recipe, apply_overrides, parse_recipe

ANSWERS = ("green", "blue")


class Parrot:
    """Answers with the last answer in its prompt, and notes what it was asked."""

    def __init__(self, base: BaseModel, dies_after: int | None = None) -> None:
        self.prompter = load_prompter(base.path, "")
        self.asked: list[str] = []
        self.dies_after = dies_after

    def __call__(
        self, model: BaseModel, asks: Sequence[Ask], limit: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        said: list[list[int]] = []
        for ids, adapter in asks:
            assert adapter is None
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            text = str(self.prompter.tokenizer.decode(list(ids)))
            self.asked.append(text)
            turns = text.split("<|im_start|>assistant\n")[1:-1]
            words = turns[-1].partition("<|im_end|>")[0] if turns else "nothing"
            said.append(list(self.prompter.completion_ids(words)))
            done(len(said))
        return said


@pytest.fixture
def few(recipe: Recipe) -> Recipe:
    return apply_overrides(
        recipe,
        ["method.kind=fewshot", "fewshot.k=[0, 1, 2]", "fewshot.draws=4", "fewshot.items=6"],
    )


@pytest.fixture
def data() -> Data:
    train = tuple(ask(f"grass {n}", ANSWERS[n % 2], f"t{n}") for n in range(20))
    validation = tuple(ask(f"leaf {n}", "green", f"v{n}") for n in range(8))
    held_out = tuple(ask(f"sea {n}", "blue", f"h{n}") for n in range(4))
    digest = digest_examples(train, held_out, validation)
    return Data(train, held_out, 0, digest, validation)


def quiet(_: Progress) -> None:
    pass


def test_every_cell_is_asked_every_question_of_the_validation_side_and_nothing_held_out(
    few: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    parrot, told = Parrot(tiny_base), list[Progress]()
    measured = measure(few, data, tiny_base, answer=parrot, progress=told.append)
    cells = 2 * (1 + 2 * 4)
    assert len(measured.measurements) == cells
    assert len(parrot.asked) == cells * 6 == told[-1].total == told[-1].done
    assert (measured.side, measured.items) == ("validation", 6)
    assert not any("sea" in text for text in parrot.asked)
    assert all("leaf" in text.split("<|im_start|>user\n")[-1] for text in parrot.asked)
    shown = {text for asked in parrot.asked for text in asked.split("user\n")[1:-1]}
    assert all(text.startswith("grass") for text in shown)
    listed = [text for text in parrot.asked if "Answer with one of:\nblue\ngreen<|im_end|>" in text]
    assert len(listed) == len(parrot.asked) // 2


def test_a_prompt_is_chosen_by_the_mean_of_its_draws_and_then_its_best_draw(
    few: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    """The parrot is right exactly where the last shot says green, which the oracle here counts."""
    measured = measure(few, data, tiny_base, answer=Parrot(tiny_base), progress=quiet)
    for measurement in measured.measurements:
        assert measurement.value in (0.0, 1.0)
    chosen = measured.choice
    means = {
        (k, listed): [
            m.value for m in measured.measurements if (m.cell.k, m.cell.listed) == (k, listed)
        ]
        for k in (0, 1, 2)
        for listed in (False, True)
    }
    best = max(sum(values) / len(values) for values in means.values())
    assert chosen.mean == pytest.approx(best)
    assert (chosen.worst, chosen.best) == (0.0, 1.0)
    assert not chosen.cell.listed, "equally good: the shorter prompt"
    assert measured.prompt.examples[-1][1] == "green"


def of(
    k: int, draw: int, value: float, tokens: float = 10.0, *, listed: bool = False
) -> Measurement:
    return Measurement(Cell(k, listed, draw), value, 0.0, 1.0, tokens)


def test_a_lucky_draw_does_not_win() -> None:
    lucky = [of(1, 0, 0.9), of(1, 1, 0.1), of(1, 2, 0.1)]
    steady = [of(4, 0, 0.5), of(4, 1, 0.6), of(4, 2, 0.5)]
    choice = choose([of(0, 0, 0.3), *lucky, *steady])
    assert (choice.cell, choice.worst, choice.best) == (Cell(4, False, 1), 0.5, 0.6)
    assert choice.mean == pytest.approx(1.6 / 3)


def test_of_equally_good_ways_the_one_with_the_shorter_prompt_is_taken() -> None:
    assert choose([of(8, 0, 0.5, 300.0), of(1, 0, 0.5, 40.0)]).cell.k == 1


def test_what_a_draw_does_not_change_is_measured_once() -> None:
    assert len(cells_of(FewShot(k=(0, 1, 1, 4)), listable=True)) == 2 * (1 + 3 + 3)
    assert len(cells_of(FewShot(choose="fixed", labels=False), listable=True)) == 4
    assert len(cells_of(FewShot(choose="nearest"), listable=False)) == 4


def test_without_a_validation_side_groups_of_the_training_side_are_asked_and_not_shown(
    few: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    parrot = Parrot(tiny_base)
    bare = replace(data, validation=())
    measured = measure(few, bare, tiny_base, answer=parrot, progress=quiet)
    assert measured.side == "training"
    asked = {text.split("<|im_start|>user\n")[-1] for text in parrot.asked}
    shown = {part for text in parrot.asked for part in text.split("<|im_start|>user\n")[1:-1]}
    assert len(asked) == 6
    assert not {text.partition("<|im_end|>")[0] for text in asked} & {
        text.partition("<|im_end|>")[0] for text in shown
    }
    assert not any("sea" in text for text in parrot.asked)


def test_an_interrupted_measurement_goes_on_where_its_answers_were_kept(
    few: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    def answered(parrot: Parrot) -> Callable[..., list[list[int]]]:
        return in_portions(remembered(tmp_path / "kept", tiny_base, parrot), 10)

    dying = Parrot(tiny_base, dies_after=35)
    with pytest.raises(KeyboardInterrupt):
        measure(few, data, tiny_base, answer=answered(dying), progress=quiet)
    again = Parrot(tiny_base)
    measured = measure(few, data, tiny_base, answer=answered(again), progress=quiet)
    assert len(dying.asked) == 35
    # Of what was asked, at most the portion that it died in is asked again.
    assert not set(dying.asked[:-10]) & set(again.asked)
    unbroken = measure(few, data, tiny_base, answer=Parrot(tiny_base), progress=quiet)
    assert measured == unbroken


def test_a_run_ends_in_a_prompt_version_and_is_found_again(
    few: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    made = make_prompt(few, data, tiny_base, tmp_path, answer=Parrot(tiny_base), progress=quiet)
    assert [path.name for path in made.folder.iterdir()] == ["wardrobe.json"]
    lineage = made.card["lineage"]
    assert len(lineage["measurements"]) == 18
    assert lineage["chosen"]["worst_draw"] <= lineage["chosen"]["mean"] <= 1
    lines = (made.folder.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == lineage["measurements"]
    silent = Parrot(tiny_base, dies_after=0)
    again = make_prompt(few, data, tiny_base, tmp_path, answer=silent, progress=quiet)
    assert (again.reused, again.card, silent.asked) == (True, made.card, [])
    bases = Bases(tiny_base.path.parent)
    with Registry.open(tmp_path / "home", bases) as registry:
        version = registry.push(made.folder, AdapterName.parse(few.name), actor="test").version
    assert version.kind == "prompt"
    assert [list(shot) for shot in version.examples] == made.card["prompt"].get("examples", [])
    assert version.size_bytes == lineage["prompt_bytes"]


def test_the_server_renders_the_very_ids_that_were_measured(
    few: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    odd = ask("  two\nlines, é 👋 ", " green", "odd")
    shown = replace(data, train=(odd, *data.train))
    fixed = apply_overrides(few, ["fewshot.choose=fixed", "fewshot.k=[3]", "fewshot.labels=true"])
    made = make_prompt(fixed, shown, tiny_base, tmp_path, answer=Parrot(tiny_base), progress=quiet)
    variant = Variant.trained("prompt", tiny_base, fixed.task.system, made.folder)
    assert variant.examples[0] == ("  two\nlines, é 👋 ", " green")
    prompter = replace(load_prompter(tiny_base.path, ""), system=variant.system)
    with Registry.open(tmp_path / "home", Bases(tiny_base.path.parent)) as registry:
        version = registry.push(made.folder, AdapterName.parse(fixed.name), actor="test").version
    tokens = Tokens(tiny_base.path)
    for question in shown.held_out:
        served = put_before(
            [ChatMessage("user", question.text)], version.system_prompt, version.examples
        )
        ids = asyncio.run(tokens.encode_chat(served, 100_000))
        assert tuple(ids) == prompter.prompt_ids(variant.turns(question))
    tokens.close()


def test_the_kind_base_is_the_recipe_s_system_text_and_asks_nobody(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    bare = apply_overrides(recipe, ["method.kind=base"])
    silent = Parrot(tiny_base, dies_after=0)
    made = make_prompt(bare, data, tiny_base, tmp_path, answer=silent, progress=quiet)
    assert made.card["kind"] == "prompt"
    assert made.card["prompt"] == {"system": "Say the colour."}


def test_nearest_is_measured_with_other_shots_for_every_question_and_makes_no_version(
    few: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    near = apply_overrides(few, ["fewshot.choose=nearest", "fewshot.labels=false"])
    with pytest.raises(RecipeError, match="one fixed prompt"):
        make_prompt(near, data, tiny_base, tmp_path, answer=Parrot(tiny_base), progress=quiet)
    parrot = Parrot(tiny_base)
    leaves = tuple(ask(f"grass {n}!", "green", f"v{n}") for n in range(3))
    measured = measure(
        near, replace(data, validation=leaves), tiny_base, answer=parrot, progress=quiet
    )
    assert [m.cell.k for m in measured.measurements] == [0, 1, 2]
    for text in parrot.asked[3:]:
        *shots, question = [turn.partition("<|im_end|>")[0] for turn in text.split("user\n")[1:]]
        assert question.removesuffix("!") not in shots, "its near duplicate would be its answer"


def test_a_prompt_that_is_too_long_for_the_base_says_which_number_to_take_out(
    few: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    long = replace(data, train=tuple(ask("x" * 400 + str(n), "green", str(n)) for n in range(9)))
    with pytest.raises(RecipeError, match="highest number out of"):
        measure(few, long, tiny_base, answer=Parrot(tiny_base), progress=quiet)


@pytest.mark.parametrize(
    "override",
    ["fewshot.k=[]", "fewshot.k=[65]", "fewshot.draws=0", "fewshot.choose=best", "fewshot.x=1"],
)
def test_few_shot_keys_that_cannot_be_are_refused(few: Recipe, override: str) -> None:
    with pytest.raises(RecipeError, match="fewshot"):
        apply_overrides(few, [override])


@pytest.mark.parametrize("kind", ["fewshot", "base", "lora"])
def test_a_recipe_that_trains_nothing_needs_no_train_table(kind: str) -> None:
    value = {
        "name": "acme/colours",
        "base": "local/tiny",
        "data": {"path": "unused.csv"},
        "task": {"system": "Say the colour.", "metric": "label"},
        "method": {"kind": kind},
    }
    if kind == "lora":
        with pytest.raises(RecipeError, match="train"):
            parse_recipe(value, Path())
    else:
        assert parse_recipe(value, Path()).method.kind == kind
