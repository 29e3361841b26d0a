"""Read a recipe's examples and split them by group, so that no held-out group was trained on."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

import msgspec

from training.data.examples import Data, Example, digest_examples
from training.data.files import read_examples
from training.errors import DataError, RecipeError
from training.hub import fetch_data_files
from training.recipe import Recipe

# name → (module, function, options): a builder's package is imported when it is asked for.
BUILDERS = {
    "home-assistant-intents": (
        "training.data.builders.home_assistant",
        "build_home_assistant",
        "HomeAssistantOptions",
    ),
    "icd-10-chapters": ("training.data.builders.icd10", "build_icd10", "Icd10Options"),
}


def load_data(recipe: Recipe) -> Data:
    """Return both sides of the recipe's data. Same recipe and sources, same order and digest."""
    examples, given = _read(recipe)
    _refuse_empty(examples)
    if given is None:
        train, held_out = split_by_group(examples, recipe.data.held_out, recipe.seed)
    else:
        train, held_out = examples, given
    held_out = _draw(_unique(held_out), recipe.data.held_out_limit, recipe.seed)
    kept = _not_in(_unique(train), held_out)
    duplicates = len(train) - len(kept)
    kept = _draw(kept, recipe.data.train_limit, recipe.seed)
    if not kept or not held_out:
        raise DataError(
            f"{len(examples)} examples leave {len(kept)} to train on and {len(held_out)} held "
            "out. Give more groups, or another data.held_out share."
        )
    digest = digest_examples(kept, held_out)
    return Data(tuple(kept), tuple(held_out), duplicates, digest)


def split_by_group(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (train, held out): whole groups, in an order that depends on their names only."""
    groups = sorted({example.group for example in examples}, key=lambda g: _place(g, seed))
    held = set(groups[: max(1, round(share * len(groups)))])
    train = [example for example in examples if example.group not in held]
    return train, [example for example in examples if example.group in held]


def _read(recipe: Recipe) -> tuple[list[Example], list[Example] | None]:
    """Return the examples, and the held-out ones where the source names them itself."""
    data = recipe.data
    if data.builder is not None:
        return _builder(data.builder)(data.options, recipe.seed), None
    if data.path is not None:
        train = recipe.folder / data.path
        held_out = recipe.folder / data.held_out_path if data.held_out_path else None
        rename: dict[str, str] = {}
    else:
        assert data.hub is not None, "the recipe was checked to have a source"
        train, held_out = fetch_data_files(data.hub)
        rename = data.hub.rename
    given = read_examples(held_out, data, recipe.task.system, rename) if held_out else None
    return read_examples(train, data, recipe.task.system, rename), given


def _builder(name: str) -> Callable[[dict[str, Any], int], list[Example]]:
    if name not in BUILDERS:
        raise RecipeError(f"data.builder = {name!r} is unknown. Known: {', '.join(BUILDERS)}.")
    module_name, function, options_name = BUILDERS[name]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise DataError(
            f"The builder {name!r} needs the package {error.name!r}, which is not installed. "
            "Install the extra: pip install 'wardrobe[demo]'."
        ) from error
    return lambda options, seed: getattr(module, function)(
        _options(getattr(module, options_name), options, name), seed
    )


def _options(shape: type, given: dict[str, Any], builder: str) -> Any:
    known = [field.name for field in fields(shape)]
    for key in given:
        if key not in known:
            raise RecipeError(
                f"data.options.{key} is no option of {builder!r}. Known: {', '.join(known)}."
            )
    try:
        return msgspec.convert(given, shape)
    except msgspec.ValidationError as error:
        raise RecipeError(f"data.options of {builder!r} are wrong: {error}.") from error


def _refuse_empty(examples: Sequence[Example]) -> None:
    for number, example in enumerate(examples, start=1):
        if not example.text.strip() or not example.completion.strip():
            raise DataError(
                f"Example {number} has an empty prompt or completion: {example.text!r} → "
                f"{example.completion!r}. Take it out of the data."
            )


def _place(group: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def _key(example: Example) -> tuple[str, ...]:
    """Return what makes two prompts equal: every turn, without case and spacing."""
    return tuple(" ".join(turn.content.casefold().split()) for turn in example.turns)


def _unique(examples: Sequence[Example]) -> list[Example]:
    """Keep the first of examples that ask the same."""
    first: dict[tuple[str, ...], Example] = {}
    for example in examples:
        first.setdefault(_key(example), example)
    return list(first.values())


def _not_in(examples: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """Leave out the examples whose prompt, or whose group, is among the others."""
    texts = {_key(other) for other in others}
    return [example for example in examples if _key(example) not in texts]


def _draw(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """Return at most `limit` examples in a seeded order."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)  # noqa: S311  # an order, not a secret
    return shuffled[:limit]
