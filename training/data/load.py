"""Split a recipe's examples by group, so that no held-out group was trained on."""

import hashlib
import random
from collections.abc import Sequence

from training.data.duplicates import normalise
from training.data.examples import Data, Example, digest_examples
from training.data.selection import Difficulty, select, without_near
from training.data.source import Source, read_source
from training.errors import DataError
from training.recipe import Recipe


def load_data(recipe: Recipe, difficulty: Difficulty | None = None) -> Data:
    """Return the sides of the recipe's data. Same recipe and sources, same order and digest.

    Raises DataError for the first row that cannot be used; `wardrobe data check` lists them all.
    `difficulty` is what a selection of the hardest or easiest rows asks.
    """
    source = read_source(recipe)
    if source.bad:
        raise source.bad[0]
    _refuse_empty(source.examples)
    return divide(source, recipe, difficulty)


def divide(source: Source, recipe: Recipe, difficulty: Difficulty | None = None) -> Data:
    """Split by group what the source does not split itself, take repetitions out, and select."""
    data, seed = recipe.data, recipe.seed
    train, validation, held_out = (
        list(side or ()) for side in (source.train, source.validation, source.held_out)
    )
    if source.held_out is None:
        train, held_out = split_by_group(train, data.held_out, seed)
    held_out = _draw(_unique(held_out), data.held_out_limit, seed)
    kept = _not_in(_unique(train), held_out)
    if source.validation is not None:
        validation = _not_in(_unique(validation), held_out)
        kept = _not_in(kept, validation)
    duplicates = len(train) - len(kept)
    if source.validation is None and data.validation:
        kept, validation = split_by_group(kept, data.validation, seed)
    validation = _draw(validation, data.validation_limit, seed)
    apart = without_near(kept, [*validation, *held_out], data.selection.near_duplicates)
    near = len(kept) - len(apart)
    kept = _draw(select(apart, data.selection, seed, difficulty), data.train_limit, seed)
    if not kept or not held_out:
        raise DataError(
            f"{len(train) + len(held_out)} examples leave {len(kept)} to train on and "
            f"{len(held_out)} held out. Give more groups, or other shares of data.held_out and "
            "data.validation."
        )
    digest = digest_examples(kept, held_out, validation)
    return Data(tuple(kept), tuple(held_out), duplicates, digest, tuple(validation), near)


def split_by_group(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (rest, share): whole groups, chosen by a hash of their names and the seed."""
    groups = sorted({example.group for example in examples}, key=lambda g: _place(g, seed))
    held = set(groups[: max(1, round(share * len(groups)))])
    train = [example for example in examples if example.group not in held]
    return train, [example for example in examples if example.group in held]


def _refuse_empty(examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, start=1):
        if not example.text.strip() or not example.completion.strip():
            raise DataError(
                f"{example.where or f'Example {number}'} has an empty prompt or completion: "
                f"{example.text!r} → {example.completion!r}. Take it out of the data."
            )


def _place(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def _key(example: Example) -> tuple[str, ...]:
    """Return what makes two prompts equal: every turn, without case and spacing."""
    return tuple(normalise(turn.content) for turn in example.turns)


def _unique(examples: Sequence[Example]) -> list[Example]:
    """Keep the first of examples that ask the same."""
    first: dict[tuple[str, ...], Example] = {}
    for example in examples:
        first.setdefault(_key(example), example)
    return list(first.values())


def _not_in(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """Leave out the examples whose prompt is among the others."""
    texts = {_key(other) for other in others}
    return [example for example in examples if _key(example) not in texts]


def _draw(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """Return at most `limit` examples in a seeded order."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  # an order, not a secret
    return shuffled[:limit]
