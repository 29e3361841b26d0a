"""Which training examples go into a prompt, and in which order."""

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from registry.adapter import Shot
from training.data.duplicates import NEAR, GramIndex
from training.data.examples import Example
from training.errors import DataError
from training.evaluation.metrics import read_json
from training.recipe import FewShot


def usable(examples: Sequence[Example]) -> list[Example]:
    """Return the examples that can be a shot: one question and its answer."""
    return [example for example in examples if len(example.turns) == 1]


def shots_of(examples: Sequence[Example], k: int, settings: FewShot, seed: str) -> tuple[Shot, ...]:
    """Return k shots in the order in which they are shown; the first of more are those of fewer."""
    _check_enough(examples, k)
    ordered = list(examples)
    if settings.choose != "fixed":
        random.Random(seed).shuffle(ordered)  # noqa: S311  # an order, not a secret
    if settings.choose == "class-covering":
        ordered = _round_robin(ordered)
    return tuple((example.text, example.completion) for example in ordered[:k])


class Neighbours:
    """The examples most like a question, for prompts that depend on it."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._index = GramIndex(example.text for example in examples)

    def shots_for(self, question: Example, k: int) -> tuple[Shot, ...]:
        """Return k shots, the most alike last. Near duplicates of the question are no shots.

        They would hand over the answer, which no real request has.
        """
        alike = self._index.similarities(question.text)
        found = [place for place in (-alike).argsort(kind="stable") if alike[place] < NEAR][:k]
        _check_enough(found, k)
        chosen = [self._examples[place] for place in reversed(found)]
        return tuple((example.text, example.completion) for example in chosen)


def class_of(example: Example) -> str:
    """Return what class-covering covers: the answer, of a JSON object only its top-level texts.

    Of `{"intent": "HassTurnOn", "slots": {…}}` that is the intent.
    """
    answer = read_json(example.completion)
    if answer is None or not isinstance(answer.value, dict):
        return example.completion
    return str(top_texts(answer.value))


def top_texts(value: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, item) for key, item in sorted(value.items()) if isinstance(item, str)]


def _round_robin(examples: Sequence[Example]) -> list[Example]:
    """Order the examples so that every class comes once before any comes twice."""
    classes: dict[str, list[Example]] = {}
    for example in examples:
        classes.setdefault(class_of(example), []).append(example)
    rounds = zip_longest(*classes.values())
    return [example for turn in rounds for example in turn if example is not None]


def _check_enough(found: Sequence[Any], k: int) -> None:
    if len(found) < k:
        raise DataError(
            f"fewshot.k asks for {k} examples, and the training side has {len(found)} to show. "
            "Take it out of fewshot.k, or give more rows."
        )
