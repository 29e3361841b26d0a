"""The recipe's own function that says whether an answer passes: `task.function = "file.py:name"`.

It is code of whoever wrote the recipe, run in this process as any script of theirs would be. A
recipe of a stranger is a program of a stranger.
"""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from training.errors import RecipeError


def load_function(folder: Path, place: str) -> Callable[[str, str, str], object]:
    """Return `name` of `file.py`, relative to the recipe: (question, answer, expected) → bool.

    Raises RecipeError when the file cannot be run or has no such function.
    """
    file, _, name = place.partition(":")
    path = folder / file
    if not path.is_file():
        raise RecipeError(f"task.function = {place!r}: there is no file {path}.")
    spec = spec_from_file_location(f"wardrobe_recipe_{path.stem}", path)
    assert spec is not None, "the recipe was checked to name a .py file"
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file may do anything
        raise RecipeError(
            f"task.function = {place!r}: {path} cannot be run: {type(error).__name__}: {error}."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"task.function = {place!r}: {path} has no function {name!r}.")
    return function
