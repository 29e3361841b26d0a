"""The run that ends in a prompt: a card that the registry takes as a version without weights."""

import json
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.card import read_card, unjudged_card, write_card
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
    settings: dict[str, Any] = {}
    if recipe.method.kind == "fewshot":
        measured = measure(recipe, data, base, answer=answer, progress=progress)
        prompt["system"] = measured.prompt.system
        if measured.prompt.examples:
            prompt["examples"] = [list(shot) for shot in measured.prompt.examples]
        lineage = facts_of(measured)
        lines = [json.dumps(line) + "\n" for line in lineage["measurements"]]
        replace_file(run.metrics, "".join(lines).encode())
        settings["fewshot"] = asdict(recipe.fewshot)
    lineage |= {
        "seconds": round(time.monotonic() - started, 1),
        "prompt_bytes": len(canonical(prompt)),
        "versions": {"torch": version("torch")},
    }
    prepared = run.prepare()
    write_card(prepared, unjudged_card("prompt", recipe, data, base, prompt, lineage, settings))
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
