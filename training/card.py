"""The card `wardrobe.json`: what a version says about how it was made and how good it is."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from training.data.examples import Data
from training.model import Hardware
from training.recipe import Recipe
from training.run import replace_file

CARD_FILE = "wardrobe.json"
NOT_EVALUATED = "The adapter was not evaluated on held-out examples yet."


def new_card(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    hardware: Hardware,
    seconds: float,
    loss: float,
    conversion: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the card of an adapter that is trained and not judged yet."""
    return {
        "kind": "full" if recipe.method.kind == "full" else "lora",
        "base": {"id": base.id, "fingerprint": base.fingerprint, "structure": base.structure},
        "prompt": {"system": recipe.task.system},
        "metrics": {},
        "gate": {"passed": False, "failures": [NOT_EVALUATED], "rules": asdict(recipe.gate)},
        "lineage": {
            "recipe_sha256": recipe.digest,
            "data_sha256": data.digest,
            "train_examples": len(data.train),
            "held_out_examples": len(data.held_out),
            "seed": recipe.seed,
            "steps": recipe.train.steps,
            "seconds": round(seconds, 1),
            "final_loss": loss,
            "device": hardware.device,
            "dtype": hardware.dtype,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            **({"conversion": conversion} if conversion else {}),
        },
        "recipe": {
            "name": recipe.name,
            "method": recipe.method.settings,
            "train": asdict(recipe.train),
        },
    }


def read_card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Replace the card as a whole."""
    text = json.dumps(card, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    replace_file(folder / CARD_FILE, (text + "\n").encode())
