"""How well prompts do: every number of examples, with and without the list, over several draws.

Measured on the validation side, or, where the data has none, on groups taken out of the training
side. Never on what is held out: that judges the chosen prompt, once.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

from registry.adapter import Shot
from registry.base import BaseModel
from training.data.examples import Data, Example
from training.data.load import split_by_group
from training.errors import RecipeError
from training.evaluation.evaluate import Answer, Ask, Item, Variant, ask_all, summed_up
from training.evaluation.metrics import judge
from training.fewshot.hint import hint_of
from training.fewshot.shots import Neighbours, shots_of, usable
from training.progress import Report
from training.prompt import load_prompter
from training.recipe import FewShot, Recipe

MEASURED_SHARE = 0.3  # of the training groups, where there is no validation side
PORTION = 256  # questions between two times that the answers are kept


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to ask."""

    k: int  # examples
    listed: bool  # whether the system prompt lists the labels or forms
    draw: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a cell reached."""

    cell: Cell
    value: float  # mean of the recipe's metric, with its 95 % interval
    low: float
    high: float
    prompt_tokens: float  # mean of a request


@dataclass(frozen=True, slots=True)
class Choice:
    """The way to ask with the best mean over its draws, and the best of these draws."""

    cell: Cell
    mean: float
    worst: float  # of the draws
    best: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured for one recipe."""

    measurements: tuple[Measurement, ...]
    choice: Choice
    prompt: Variant  # the chosen one
    side: str  # validation or training
    items: int


def measure(
    recipe: Recipe, data: Data, base: BaseModel, *, answer: Answer, progress: Report
) -> Measured:
    """Measure every cell of the recipe and choose.

    The questions of all cells are asked together, in portions of one mixed batch each, so that an
    `answer` that remembers goes on where it was interrupted. Raises RecipeError, DataError,
    BaseUnavailable.
    """
    settings = recipe.fewshot
    train, items = _sides(data, settings, recipe.seed)
    hint = hint_of(settings, train)
    cells = cells_of(settings, listable=hint is not None)
    ask = _asker(recipe, base, usable(train), hint)
    asks = [(ask(cell, item), item) for cell in cells for item in items]
    told = _answered(recipe, base, asks, in_portions(answer), progress)
    measurements = tuple(
        _measurement(cell, told[place * len(items) : (place + 1) * len(items)])
        for place, cell in enumerate(cells)
    )
    choice = choose(measurements)
    side = "validation" if data.validation else "training"
    return Measured(measurements, choice, ask(choice.cell, items[0]), side, len(items))


def cells_of(settings: FewShot, *, listable: bool) -> list[Cell]:
    """Return what is measured. Where a draw changes nothing there is one."""
    lists = {"auto": (False, True), True: (True,), False: (False,)}[settings.labels]
    drawn = settings.draws if settings.choose in ("random", "class-covering") else 1
    return [
        Cell(k, listed, draw)
        for listed in lists
        if listable or not listed
        for k in sorted(set(settings.k))
        for draw in range(drawn if k else 1)
    ]


def choose(measurements: Sequence[Measurement]) -> Choice:
    """Choose by the mean over the draws, not by a lucky one; of equal ones the shorter prompt."""
    ways: dict[tuple[int, bool], list[Measurement]] = {}
    for measured in measurements:
        ways.setdefault((measured.cell.k, measured.cell.listed), []).append(measured)
    draws = max(ways.values(), key=lambda way: (_mean(way), -way[0].prompt_tokens))
    best = max(draws, key=lambda measured: (measured.value, -measured.cell.draw))
    return Choice(best.cell, _mean(draws), min(m.value for m in draws), best.value)


def in_portions(answer: Answer, size: int = PORTION) -> Answer:
    """Return `answer` asked so many questions at a time."""

    def run(
        model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        said: list[list[int]] = []

        def told(count: int) -> None:
            done(len(said) + count)

        for start in range(0, len(asks), size):
            said += answer(model, asks[start : start + size], max_new_tokens, told)
        return said

    return run


def _sides(data: Data, settings: FewShot, seed: int) -> tuple[list[Example], list[Example]]:
    """Return what examples are taken from, and what is asked."""
    if data.validation:
        train, asked = list(data.train), list(data.validation)
    else:
        train, asked = split_by_group(data.train, MEASURED_SHARE, seed)
    random.Random(f"{seed}:items").shuffle(asked)  # noqa: S311  # an order, not a secret
    return train, asked[: settings.items]


def _asker(
    recipe: Recipe, base: BaseModel, train: Sequence[Example], hint: str | None
) -> Callable[[Cell, Example], Variant]:
    """Return the function from a cell and a question to how it is asked."""
    settings, plain = recipe.fewshot, recipe.task.system

    def asked(cell: Cell, shots: tuple[Shot, ...]) -> Variant:
        system = f"{plain}\n{hint}" if cell.listed else plain
        return Variant(f"k = {cell.k}", base, system, None, shots)

    if settings.choose == "nearest":
        neighbours = Neighbours(train)
        return lambda cell, question: asked(cell, neighbours.shots_for(question, cell.k))

    @cache
    def fixed(cell: Cell) -> Variant:
        return asked(cell, shots_of(train, cell.k, settings, f"{recipe.seed}:{cell.draw}"))

    return lambda cell, _: fixed(cell)


def _answered(
    recipe: Recipe,
    base: BaseModel,
    asks: Sequence[tuple[Variant, Example]],
    answer: Answer,
    progress: Report,
) -> list[Item]:
    """Ask everything in one mixed batch and judge it."""
    prompter = load_prompter(base.path, recipe.task.system)
    prompts = [
        replace(prompter, system=variant.system).prompt_ids(variant.turns(item))
        for variant, item in asks
    ]
    _check_length(max(map(len, prompts)), recipe, base)
    outputs = ask_all(
        [(variant, prompt) for (variant, _), prompt in zip(asks, prompts, strict=True)],
        recipe.task.max_new_tokens,
        answer,
        progress=progress,
        text="prompts",
    )
    judged, said = judge(recipe), map(prompter.answer, outputs)
    return [
        Item(item, text, judged(item, text), len(prompt))
        for (_, item), text, prompt in zip(asks, said, prompts, strict=True)
    ]


def _check_length(longest: int, recipe: Recipe, base: BaseModel) -> None:
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    context = config.get("max_position_embeddings")
    if context and longest + recipe.task.max_new_tokens > context:
        raise RecipeError(
            f"The longest prompt of fewshot.k = {list(recipe.fewshot.k)} has {longest} tokens and "
            f"its answer may have {recipe.task.max_new_tokens}; the base's context is {context}. "
            "Take the highest number out of fewshot.k."
        )


def _measurement(cell: Cell, items: Sequence[Item]) -> Measurement:
    share = summed_up("", items, ()).score.share
    tokens = fmean(item.prompt_tokens for item in items)
    return Measurement(cell, share.value, share.low, share.high, tokens)


def _mean(draws: Sequence[Measurement]) -> float:
    return fmean(measured.value for measured in draws)
