"""What a recipe's source holds: every row of a builder, of files, or of a data set on the Hub."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

import msgspec

from training.data.examples import Example
from training.data.files import read_rows
from training.errors import BadRow, DataError, RecipeError
from training.hub import fetch_data_files
from training.recipe import DataSource, Recipe

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

    train: tuple[Example, ...]
    validation: tuple[Example, ...] | None = None
    held_out: tuple[Example, ...] | None = None
    bad: tuple[BadRow, ...] = ()  # rows that are no examples, in order

    @property
    def examples(self) -> tuple[Example, ...]:
        """Every example, whichever side it is on."""
        return (*self.train, *(self.validation or ()), *(self.held_out or ()))


def read_source(recipe: Recipe) -> Source:
    """Read everything the source holds. A wrong row is told, not raised; a wrong file is raised."""
    data = recipe.data
    if data.builder is not None:
        return _labelled(Source(tuple(_builder(data.builder)(data.options, recipe.seed))), data)
    if data.path is not None:
        names = (data.path, data.validation_path, data.held_out_path)
        paths = [recipe.folder / name if name else None for name in names]
        rename: dict[str, str] = {}
    else:
        assert data.hub is not None, "the recipe was checked to have a source"
        paths, rename = fetch_data_files(data.hub), data.hub.rename
    sides: list[tuple[Example, ...] | None] = []
    bad: list[BadRow] = []
    for path in paths:
        rows = list(read_rows(path, data, recipe.task.system, rename)) if path else []
        bad += (row for row in rows if isinstance(row, BadRow))
        sides.append(tuple(r for r in rows if isinstance(r, Example)) if path else None)
    train, validation, held_out = sides
    return _labelled(Source(train or (), validation, held_out, tuple(bad)), data)


def _labelled(source: Source, data: DataSource) -> Source:
    """Keep the examples with one of the recipe's labels; where it names none, all."""
    if not data.labels:
        return source
    found = {example.completion for example in source.examples}
    for label in data.labels:
        if label not in found:
            raise DataError(f"data.labels names {label!r}, and no row has this completion.")
    sides = (source.train, source.validation, source.held_out)
    train, validation, held_out = (
        tuple(e for e in side if e.completion in data.labels) if side is not None else None
        for side in sides
    )
    return Source(train or (), validation, held_out, source.bad)


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
