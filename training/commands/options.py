"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFolder = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A folder with a recipe.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
]
Minutes = Annotated[
    float | None, typer.Option(min=0.5, help="Leave out, and name, what does not fit in.")
]
