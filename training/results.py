"""Write what a run has trained, in the form in which it is kept."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from training.adapter_files import write_as_peft, write_lora
from training.conversion import Weights, plain_lora
from training.errors import RecipeError
from training.recipe import Method, Recipe
from training.whole import write_whole

NOT_LOW_RANK = ("ia3", "prompt-tuning", "prefix-tuning")  # kept as PEFT saves them


def is_measured_only(recipe: Recipe) -> bool:
    """Tell whether the recipe takes other examples for every request: no version comes of it."""
    return recipe.method.kind == "fewshot" and recipe.fewshot.choose == "nearest"


def check_pushable(recipe: Recipe, promote: bool) -> None:
    """Raise RecipeError where the registry will not take, or not promote, what the method makes."""
    if recipe.method.kind == "full" and promote:
        raise RecipeError(
            "A full fine-tune is kept whole and cannot be promoted. Train it with --push, then "
            "make an adapter of it: wardrobe extract NAMESPACE/NAME@vN --push"
        )
    if is_measured_only(recipe):
        raise RecipeError(
            'fewshot.choose = "nearest" takes other examples for every request, and a version is '
            "one fixed prompt. Measure it without --push; for a version use another "
            'fewshot.choose, for example "class-covering".'
        )


def write_result(
    model: Any, method: Method, start: Weights, base: BaseModel, folder: Path
) -> dict[str, Any] | None:
    """Write the model's adapter, or the model itself for `full`, into a new folder.

    Returns what the card says of a conversion that is not exact, else None.
    """
    if method.kind == "full":
        write_whole(model, base, folder)
        return None
    if method.kind in NOT_LOW_RANK:
        write_as_peft(model, base.id, folder)
        return None
    lora, conversion = plain_lora(model, method, start)
    write_lora(lora, base.id, folder)
    return asdict(conversion) if conversion else None
