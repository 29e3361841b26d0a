"""Read a recipe's examples and split them by group, so that no held-out group was trained on."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import msgspec

from training.data.duplicates import normalise
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


@dataclass(frozen=True, slots=True)
class Source:
    """What a recipe's source holds; None where it names no such side itself."""

    train: list[Example]
    validation: list[Example] | None = None
    held_out: list[Example] | None = None


def load_data(recipe: Recipe) -> Data:
    """Return the sides of the recipe's data. Same recipe and sources, same order and digest."""
    data, seed = recipe.data, recipe.seed
    source = _read(recipe)
    train, validation, held_out = _labelled(source, data.labels)
    _refuse_empty([*train, *validation, *held_out])
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
    kept = _draw(kept, data.train_limit, seed)
    if not kept or not held_out:
        raise DataError(
            f"{len(train) + len(held_out)} examples leave {len(kept)} to train on and "
            f"{len(held_out)} held out. Give more groups, or other shares of data.held_out and "
            "data.validation."
        )
    digest = digest_examples(kept, held_out, validation)
    return Data(tuple(kept), tuple(held_out), duplicates, digest, tuple(validation))


def split_by_group(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return (rest, share): whole groups, chosen by a hash of their names and the seed."""
    groups = sorted({example.group for example in examples}, key=lambda g: _place(g, seed))
    held = set(groups[: max(1, round(share * len(groups)))])
    train = [example for example in examples if example.group not in held]
    return train, [example for example in examples if example.group in held]


def _read(recipe: Recipe) -> Source:
    data = recipe.data
    if data.builder is not None:
        return Source(_builder(data.builder)(data.options, recipe.seed))
    if data.path is not None:
        names = (data.path, data.validation_path, data.held_out_path)
        paths = [recipe.folder / name if name else None for name in names]
        rename: dict[str, str] = {}
    else:
        assert data.hub is not None, "the recipe was checked to have a source"
        paths, rename = fetch_data_files(data.hub), data.hub.rename
    train, validation, held_out = (
        read_examples(path, data, recipe.task.system, rename) if path else None for path in paths
    )
    assert train is not None, "every source has rows to train on"
    return Source(train, validation, held_out)


def _labelled(source: Source, labels: Sequence[str]) -> tuple[list[Example], ...]:
    """Return the three sides with the examples of these labels only; with no labels, all."""
    sides = (source.train, source.validation or [], source.held_out or [])
    found = {example.completion for side in sides for example in side}
    for label in labels:
        if label not in found:
            raise DataError(f"data.labels names {label!r}, and no row has this completion.")
    return tuple([e for e in side if not labels or e.completion in labels] for side in sides)


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
