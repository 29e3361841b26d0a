"""The commands of training that need no serving."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from registry.base import BaseModel, Bases
from registry.commands import Json, clear_errors
from registry.errors import BaseNotFound
from registry.home import default_cache
from registry.screen import print_json, shown

# torch and transformers are imported where a command needs them, so that `--help` answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False)
data_app = typer.Typer(
    no_args_is_help=True, help="The rows a recipe trains on: check, split, generate."
)
app.add_typer(data_app, name="data")

RecipeFolder = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A folder with a recipe.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
]
out = Console(soft_wrap=True)


def known_bases() -> Bases:
    return Bases(default_cache() / "bases")


def find_base(spec: str) -> BaseModel:
    """Return a base by its id; pull it when it is not on this machine yet."""
    try:
        return known_bases().get(spec)
    except BaseNotFound:
        return pull(spec)


def pull(spec: str, base_id: str | None = None) -> BaseModel:
    from training.base import pull_base
    from training.screen import progress_bars

    with progress_bars() as report:
        return pull_base(spec, known_bases(), progress=report, base_id=base_id)


@data_app.command("check")
@clear_errors()
def data_check(
    recipe: RecipeFolder,
    overrides: Overrides = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 on warnings as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List everything that is wrong with a recipe's data; exit with 1 on an error."""
    from training.data.inspection import inspect_data
    from training.data.screen import inspection_lines
    from training.recipe import apply_overrides, load_recipe
    from training.screen import progress_bars

    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    base = find_base(chosen.base)
    with progress_bars() as report:
        inspection, _ = inspect_data(chosen, base.path, report)
    if as_json:
        print_json(inspection)
    else:
        for line in inspection_lines(inspection):
            out.print(line, highlight=False)
    if inspection.errors or (strict and inspection.findings):
        raise typer.Exit(1)


@data_app.command("split")
@clear_errors()
def data_split(
    recipe: RecipeFolder,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write the sides of a recipe's data, as selected and checked, with a data card."""
    from training.data.folder import write_folder
    from training.data.inspection import inspect_data
    from training.data.screen import inspection_lines
    from training.recipe import apply_overrides, load_recipe
    from training.screen import progress_bars

    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    base = find_base(chosen.base)
    with progress_bars() as report:
        inspection, data = inspect_data(chosen, base.path, report)
    if data is None or inspection.errors:
        for line in inspection_lines(inspection):
            out.print(line, highlight=False)
        raise typer.Exit(1)
    card = write_folder(folder, chosen, base, data, inspection)
    if as_json:
        return print_json(card)
    for name, facts in card["files"].items():
        out.print(f"{shown(str(folder / name))}: {facts['rows']:,} rows", highlight=False)
    out.print(f"{shown(str(folder / 'README.md'))} says what they are", highlight=False)
    return None
