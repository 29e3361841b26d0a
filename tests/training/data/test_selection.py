from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from registry.base import BaseModel
from training.data.difficulty import difficulty_of
from training.data.duplicates import similarity
from training.data.examples import Example, ask
from training.data.selection import select, without_near
from training.errors import DataError, RecipeError
from training.prompt import load_prompter
from training.recipe import Selection, apply_overrides, parse_recipe

THINGS = ("lamp", "radio", "heater", "curtain", "oven")
EXAMPLES = [
    ask(f"please turn the {thing} {way} number {n}", way, f"{thing} {n}")
    for thing in THINGS
    for way in ("on", "off")
    for n in range(4)
] + [ask("who wrote Faust?", "other", "w"), ask("what is 7 times 8?", "other", "q")]


def prompts(examples: Sequence[Example]) -> list[str]:
    return [example.prompt for example in examples]


def test_near_duplicates_of_each_other_and_of_what_is_judged_are_left_out() -> None:
    judged = [ask("who wrote Faust I?", "other", "x")]
    kept = without_near(EXAMPLES, judged, 0.6)
    assert without_near(EXAMPLES, judged, None) == EXAMPLES
    assert 2 <= len(kept) < len(EXAMPLES)
    assert "who wrote Faust?" not in prompts(kept)
    assert all(similarity(a, b) < 0.6 for a, b in combinations(prompts([*kept, *judged]), 2))
    for left_out in set(prompts(EXAMPLES)) - set(prompts(kept)):
        assert max(similarity(left_out, other) for other in prompts([*kept, *judged])) >= 0.6


def test_a_diverse_choice_is_farthest_first() -> None:
    chosen = select(EXAMPLES, Selection(rows=6, by="diverse"), seed=3)
    texts = prompts(EXAMPLES)
    # The definition, step by step: each next one minimises its greatest similarity to the chosen.
    for start in range(len(texts)):
        walk = [start]
        while len(walk) < 6:
            rest = [place for place in range(len(texts)) if place not in walk]
            walk.append(min(rest, key=lambda p: max(similarity(texts[p], texts[w]) for w in walk)))
        if sorted(walk) == [texts.index(text) for text in prompts(chosen)]:
            break
    else:
        pytest.fail(f"{prompts(chosen)} is no farthest-first walk")
    assert {"who wrote Faust?", "what is 7 times 8?"} <= set(prompts(chosen))


def test_a_balanced_choice_takes_every_label_in_turn() -> None:
    chosen = select(EXAMPLES, Selection(rows=10, by="balanced"), seed=0)
    assert Counter(e.completion for e in chosen) == {"on": 4, "off": 4, "other": 2}
    again = select(EXAMPLES, Selection(rows=10, by="balanced"), seed=0)
    other = select(EXAMPLES, Selection(rows=10, by="balanced"), seed=1)
    assert prompts(chosen) == prompts(again) != prompts(other)


def test_difficulty_chooses_from_either_end() -> None:
    def length(examples: Sequence[Example]) -> list[float]:
        return [float(len(example.prompt)) for example in examples]

    hard = select(EXAMPLES, Selection(rows=3, by="hard"), 0, length)
    easy = select(EXAMPLES, Selection(rows=2, by="easy"), 0, length)
    assert min(map(len, prompts(hard))) == len("please turn the curtain off number 0")
    assert prompts(easy) == ["who wrote Faust?", "what is 7 times 8?"]
    with pytest.raises(DataError, match="wardrobe data split"):
        select(EXAMPLES, Selection(rows=3, by="hard"), 0)


def test_a_number_of_rows_and_a_rule_need_each_other() -> None:
    value = {
        "name": "a/b",
        "base": "local/tiny",
        "data": {"path": "x.csv"},
        "task": {"system": "S", "metric": "exact"},
        "train": {"steps": 1},
    }
    recipe = parse_recipe(value, Path())
    with pytest.raises(RecipeError, match="need each other"):
        apply_overrides(recipe, ["data.selection.rows=5"])
    both = apply_overrides(recipe, ["data.selection={rows = 5, by = 'diverse'}"])
    assert both.data.selection == Selection(rows=5, by="diverse")


def test_difficulty_is_the_mean_loss_that_transformers_itself_computes(
    tiny_base: BaseModel,
) -> None:
    prompter = load_prompter(tiny_base.path, "Sort.")
    told: list[int] = []
    examples = EXAMPLES[:3]
    found = difficulty_of(tiny_base, "Sort.", lambda p: told.append(p.done))(examples)
    model = AutoModelForCausalLM.from_pretrained(tiny_base.path, dtype=torch.float32)
    for example, loss in zip(examples, found, strict=True):
        prompt, completion = prompter.encode(example)
        labels = torch.tensor([(-100,) * len(prompt) + completion])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt + completion]), labels=labels).loss
        assert loss == pytest.approx(float(expected), rel=0.02)  # the base may be read in bf16
    assert told == [3], "all at once"
