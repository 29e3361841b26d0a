"""The run that ends in a prompt: a card that the registry takes as a version without weights."""

import json
import shutil
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.card import NOT_EVALUATED, read_card, write_card
from training.data.examples import Data
from training.evaluation.evaluate import Answer
from training.fewshot.measure import Measured, Measurement, measure
from training.progress import Report
from training.recipe import Recipe
from training.results import check_pushable
from training.run import Run, open_run, replace_file
from training.train import TrainedAdapter


def make_prompt(
    recipe: Recipe, data: Data, base: BaseModel, runs: Path, *, answer: Answer, progress: Report
) -> TrainedAdapter:
    """Measure and choose a prompt, or find it again, in a folder under `runs`.

    For the kind `base` nothing is measured: the prompt is the recipe's system text. The card has
    no metrics yet, as after training. Raises RecipeError, DataError, RunFailed.
    """
    check_pushable(recipe, promote=False)
    facts = {
        "base": base.fingerprint,
        "data": data.digest,
        "recipe": recipe.digest,  # all of it: what was answered before is not asked again
        "versions": {"torch": version("torch")},
    }
    with open_run(runs, facts) as run:
        reused = run.finished
        if not reused:
            _fill(run, recipe, data, base, answer, progress)
        card = read_card(run.adapter)
        return TrainedAdapter(run.adapter, card, dropped=0, reused=reused, curve=None)


def _fill(
    run: Run, recipe: Recipe, data: Data, base: BaseModel, answer: Answer, progress: Report
) -> None:
    started = time.monotonic()
    prompt: dict[str, Any] = {"system": recipe.task.system}
    lineage: dict[str, Any] = {}
    if recipe.method.kind == "fewshot":
        measured = measure(recipe, data, base, answer=answer, progress=progress)
        prompt["system"] = measured.prompt.system
        if measured.prompt.examples:
            prompt["examples"] = [list(shot) for shot in measured.prompt.examples]
        lineage = facts_of(measured)
        lines = [json.dumps(line) + "\n" for line in lineage["measurements"]]
        replace_file(run.metrics, "".join(lines).encode())
    lineage["seconds"] = round(time.monotonic() - started, 1)
    prepared = run.folder / "adapter.partial"
    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    write_card(prepared, new_prompt_card(recipe, data, base, prompt, lineage))
    run.publish(prepared)


def facts_of(measured: Measured) -> dict[str, Any]:
    """Return what the card tells of how its prompt was chosen."""
    choice = measured.choice
    return {
        "measured_on": measured.side,
        "measured_examples": measured.items,
        "measurements": [_line(measurement) for measurement in measured.measurements],
        "chosen": asdict(choice.cell)
        | {
            "mean": round(choice.mean, 4),
            "worst_draw": round(choice.worst, 4),
            "best_draw": round(choice.best, 4),
        },
    }


def _line(measurement: Measurement) -> dict[str, Any]:
    facts = asdict(measurement)
    cell = facts.pop("cell")
    return cell | {key: round(value, 4) for key, value in facts.items()}


def new_prompt_card(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    prompt: dict[str, Any],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Return the card of a prompt that is not judged yet."""
    return {
        "kind": "prompt",
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
            "prompt_bytes": len(canonical(prompt)),
            "versions": {"torch": version("torch")},
            **lineage,
        },
        "recipe": {
            "name": recipe.name,
            "method": recipe.method.settings,
            **({"fewshot": asdict(recipe.fewshot)} if recipe.method.kind == "fewshot" else {}),
        },
    }
