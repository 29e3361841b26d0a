"""The card `wardrobe.json`: what a version says about how it was made and how good it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from registry.base import BaseModel
from training.data.examples import Data
from training.model import Hardware
from training.recipe import Recipe
from training.run import replace_file

CARD_FILE = "wardrobe.json"
NOT_EVALUATED = "It was not evaluated on held-out examples yet."


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a whole run took and reached, as its card's lineage says it."""

    steps: int
    seconds: float
    final_loss: float
    best_step: int | None  # where the weights are from, with early stopping
    validation_loss: float | None  # of these weights, where a share of the data validates

    @classmethod
    def of(cls, lineage: Mapping[str, Any]) -> "Fitted":
        return cls(**{field.name: lineage[field.name] for field in fields(cls)})


def fitted_of(lines: Sequence[Mapping[str, Any]], *, best: bool) -> Fitted:
    """Sum up the lines of metrics.jsonl. The Trainer keeps the `best` weights, or else the last.

    The first of equal validation losses is the best, as the Trainer has it.
    """
    trained = [line for line in lines if "loss" in line]
    looks = [line for line in lines if "validation_loss" in line]
    if best:
        looks = [min(looks, key=lambda line: line["validation_loss"])]
    return Fitted(
        steps=trained[-1]["step"],
        seconds=round(lines[-1]["seconds"], 1),
        final_loss=trained[-1]["loss"],
        best_step=looks[-1]["step"] if best else None,
        validation_loss=looks[-1]["validation_loss"] if looks else None,
    )


def new_card(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    hardware: Hardware,
    fitted: Fitted,
    rows: Mapping[str, Any],
    conversion: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the card of an adapter that is trained and not judged yet.

    `rows` is the lineage of rows that are not in the data: the base's own answers, or pairs.
    """
    lineage = {
        **asdict(fitted),
        **rows,
        "device": hardware.device,
        "dtype": hardware.dtype,
        "versions": versions_of(recipe),
        **({"conversion": conversion} if conversion else {}),
    }
    kind = "full" if recipe.method.kind == "full" else "lora"
    prompt = {"system": recipe.task.system}
    return unjudged_card(kind, recipe, data, base, prompt, lineage, {"train": asdict(recipe.train)})


def unjudged_card(
    kind: Literal["lora", "full", "prompt"],
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    prompt: Mapping[str, Any],
    lineage: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what every card has; `lineage` and the recipe's `settings` are added to it."""
    return {
        "kind": kind,
        "base": {"id": base.id, "fingerprint": base.fingerprint, "structure": base.structure},
        "prompt": prompt,
        "metrics": {},
        "gate": {"passed": False, "failures": [NOT_EVALUATED], "rules": asdict(recipe.gate)},
        "lineage": {
            "recipe_sha256": recipe.digest,
            "data_sha256": data.digest,
            "train_examples": len(data.train),
            "held_out_examples": len(data.held_out),
            "seed": recipe.seed,
            **lineage,
        },
        "recipe": {"name": recipe.name, "method": recipe.method.settings, **settings},
    }


def versions_of(recipe: Recipe) -> dict[str, str]:
    """Return the versions of the packages that a trained adapter's bytes depend on."""
    names = ["torch", "transformers", "peft", *(["trl"] if recipe.preference else [])]
    return {name: version(name) for name in names}


def read_card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Replace the card as a whole."""
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    replace_file(folder / CARD_FILE, (text + "\n").encode())
