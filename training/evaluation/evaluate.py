"""Judge variants of a model on held-out examples, by what they generate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from registry.base import BaseModel
from registry.contents import CONFIG_NAME, MODEL_NAME
from training.card import read_card
from training.data.duplicates import NEAR, nearest
from training.data.examples import Data, Example, Turn
from training.errors import TrainingError
from training.evaluation.metrics import Score, Verdict, judge, score
from training.evaluation.statistics import Loss
from training.progress import Progress, Report
from training.prompt import Prompter
from training.recipe import Recipe
from training.whole import as_model

# What is asked of a model: prompt ids, and the adapter folder to wear or None for the model as it
# is.
Ask = tuple[tuple[int, ...], Path | None]

# (model, asks, max_new_tokens, done) → greedy output ids in the order of the asks, all answered in
# one mixed batch; `done` is told how many have ended.
Answer = Callable[[BaseModel, Sequence[Ask], int, Callable[[int], None]], list[list[int]]]

NEAR_PART, CLEAN_PART = "near_duplicate", "clean"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to answer: a model, what it wears, and what stands before the question."""

    name: str  # for people, and the key of its result
    model: BaseModel  # a full fine-tune is a model of its own
    system: str
    adapter: Path | None = None  # a folder in PEFT's format
    examples: tuple[tuple[str, str], ...] = ()  # (user, assistant) turns before the question

    @classmethod
    def trained(cls, name: str, base: BaseModel, system: str, folder: Path) -> "Variant":
        """Return what a run left in `folder`: an adapter of the base, a model, or a prompt."""
        if (folder / MODEL_NAME).is_file():
            return cls(name, as_model(base, folder), system)
        if not (folder / CONFIG_NAME).is_file():
            prompt = read_card(folder)["prompt"]
            shots = tuple((user, assistant) for user, assistant in prompt.get("examples", []))
            return cls(name, base, prompt["system"], None, shots)
        return cls(name, base, system, folder)

    def turns(self, example: Example) -> tuple[Turn, ...]:
        shots = [
            turn
            for user, assistant in self.examples
            for turn in (Turn("user", user), Turn("assistant", assistant))
        ]
        return (*shots, *example.turns)


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out example, what the model answered, and the verdict."""

    example: Example
    answer: str
    verdict: Verdict
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How one variant did on the held-out examples."""

    name: str
    items: tuple[Item, ...]
    score: Score
    parts: dict[str, Score]  # of the items with a near-duplicate in training, and of the rest
    loss: Loss | None = None  # of the expected answers, where it was measured

    @property
    def values(self) -> list[float]:
        return [float(item.verdict.value) for item in self.items]

    @property
    def groups(self) -> list[str]:
        return [item.example.group for item in self.items]


def near_duplicates(data: Data) -> list[bool]:
    """Tell which held-out prompts have a training prompt that is nearly the same text."""
    alike = nearest([e.prompt for e in data.held_out], [e.prompt for e in data.train])
    return [similarity >= NEAR for similarity in alike]


def evaluate(
    recipe: Recipe,
    held_out: Sequence[Example],
    variants: Sequence[Variant],
    prompter: Prompter,
    answer: Answer,
    *,
    progress: Report,
    near: Sequence[bool] = (),
) -> list[Evaluation]:
    """Ask every variant every held-out example and judge the answers; in the variants' order.

    All variants of one model are asked in one mixed batch. Given what `near_duplicates` says of
    the examples, the score is broken down by it, too.
    """
    judged = judge(recipe)
    prompts = [
        replace(prompter, system=variant.system).prompt_ids(variant.turns(example))
        for variant in variants
        for example in held_out
    ]
    text = ", ".join(variant.name for variant in variants)
    worn = [variant for variant in variants for _ in held_out]
    outputs = ask_all(
        list(zip(worn, prompts, strict=True)),
        recipe.task.max_new_tokens,
        answer,
        progress=progress,
        text=text if len(text) <= 40 else f"{len(variants)} variants",
    )
    results: list[Evaluation] = []
    for number, variant in enumerate(variants):
        here = slice(number * len(held_out), (number + 1) * len(held_out))
        items = tuple(
            Item(example, said, judged(example, said), len(prompt))
            for example, said, prompt in zip(
                held_out, map(prompter.answer, outputs[here]), prompts[here], strict=True
            )
        )
        results.append(summed_up(variant.name, items, near))
    return results


def summed_up(name: str, items: Sequence[Item], near: Sequence[bool]) -> Evaluation:
    """Score all items, and apart those with a near-duplicate in training and the others."""
    by_part: dict[str, list[Item]] = {}
    for item, alike in zip(items, near, strict=True) if near else ():
        by_part.setdefault(NEAR_PART if alike else CLEAN_PART, []).append(item)
    parts = {part: _score(chosen) for part, chosen in sorted(by_part.items())}
    return Evaluation(name, tuple(items), _score(items), parts)


def _score(items: Sequence[Item]) -> Score:
    return score([item.verdict for item in items], [item.example.group for item in items])


def ask_all(
    asks: Sequence[tuple[Variant, tuple[int, ...]]],
    max_new_tokens: int,
    answer: Answer,
    *,
    progress: Report,
    text: str = "",
) -> list[list[int]]:
    """Return the output ids of every (variant, prompt), in order: one mixed batch a model."""
    total = len(asks)
    outputs: dict[int, list[int]] = {}

    def done(count: int) -> None:
        progress(Progress("evaluate", len(outputs) + count, total, text))

    done(0)
    by_model = sorted(range(total), key=lambda place: asks[place][0].model.fingerprint)
    for _, group in groupby(by_model, key=lambda place: asks[place][0].model.fingerprint):
        places = list(group)
        pairs = [(asks[place][1], asks[place][0].adapter) for place in places]
        said = answer(asks[places[0]][0].model, pairs, max_new_tokens, done)
        if len(said) != len(places):
            raise TrainingError(
                f"{len(places)} prompts were asked and {len(said)} answers came back."
            )
        outputs |= dict(zip(places, said, strict=True))
    return [outputs[place] for place in range(total)]
