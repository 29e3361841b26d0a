"""The training run: a recipe and its data in, an adapter folder out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainingArguments

from registry.base import BaseModel
from training.arguments import one_device, trackers, trainer_arguments
from training.batches import MaskedSample, collate
from training.card import Fitted, fitted_of, new_card, read_card, versions_of, write_card
from training.conversion import starting_weights
from training.curve import draw_curve
from training.data.examples import Data
from training.evaluation.evaluate import Answer
from training.model import Batch, Hardware, check_runnable, detect_hardware, load_model
from training.preference import preference_trainer
from training.processes import first_alone, is_first_process, process_count, wait_for_all
from training.progress import Report, own_progress_only
from training.prompt import Prompter, load_prompter
from training.recipe import Recipe
from training.replay import replay_rows
from training.results import write_result
from training.rows import Rows, make_rows
from training.run import Run, open_run
from training.steps import callbacks_for

FIRST_ROWS = 128  # that EVA looks at


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A finished run: a folder the registry takes, and what it says about itself."""

    folder: Path  # adapter_config.json, adapter_model.safetensors, wardrobe.json
    card: dict[str, Any]
    dropped: int  # examples too long, where the recipe says to drop them
    reused: bool  # the very same run was finished before
    curve: Path | None  # the loss as a picture; None where nothing is installed to draw it


def train(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    runs: Path,
    *,
    progress: Report,
    show: Callable[[MaskedSample], None],
    hardware: Hardware | None = None,
    answer: Answer | None = None,
) -> TrainedAdapter:
    """Train, or continue, or find again, the run of this recipe in a folder under `runs`.

    `show` gets what the first training row looks like to the loss, before the first step.
    `answer` is asked what the base says, before the model is loaded, where the recipe has a
    [replay]: wrap it in `training.evaluation.memory.remembered`, so that it is asked only once.
    Equal recipe, data, base, versions and hardware give equal bytes, also after an interruption.
    The card has no metrics yet: `training.evaluation.evaluate` judges the adapter and completes it.
    Raises RecipeError, DataError, RunFailed, BaseUnavailable.
    """
    hardware = hardware or detect_hardware()
    check_runnable(recipe.method, hardware)
    prompter = load_prompter(base.path, recipe.task.system)
    replayed = first_alone(lambda: replay_rows(recipe, base, answer, progress))
    rows = make_rows(recipe, data, prompter, replayed)
    show(rows.shown)
    with open_run(runs, run_facts(recipe, data, base, hardware, rows)) as run:
        reused = run.finished
        if not reused:
            first = _first_batches(rows, prompter.end_of_turn)
            model = load_model(base.path, recipe.method, hardware, recipe.seed, first)
            start = starting_weights(model, recipe.method)
            _fit(recipe, model, rows, prompter, run, hardware, progress)
            if is_first_process():
                prepared = run.prepare()
                conversion = write_result(model, recipe.method, start, base, prepared)
                fitted = fitted_of(run.read_metrics(), best=recipe.train.patience is not None)
                card = new_card(recipe, data, base, hardware, fitted, rows.lineage, conversion)
                write_card(prepared, card)
                run.publish(prepared)
            wait_for_all()
        if is_first_process():
            draw_curve(run)
        card = _card_of(run.adapter, recipe, data, base, hardware, rows)
        curve = run.curve if run.curve.exists() else None
        return TrainedAdapter(run.adapter, card, rows.dropped, reused, curve)


def _card_of(
    folder: Path, recipe: Recipe, data: Data, base: BaseModel, hardware: Hardware, rows: Rows
) -> dict[str, Any]:
    """Return the adapter's card; start it anew when the recipe judges or names it differently now.

    A gate or a metric changes no weight, so the run is found again; its old verdict must not be.
    """
    card = read_card(folder)
    lineage = card["lineage"]
    if lineage["recipe_sha256"] != recipe.digest:
        fitted, conversion = Fitted.of(lineage), lineage.get("conversion")
        card = new_card(recipe, data, base, hardware, fitted, rows.lineage, conversion)
        write_card(folder, card)
    return card


def run_facts(
    recipe: Recipe, data: Data, base: BaseModel, hardware: Hardware, rows: Rows
) -> dict[str, Any]:
    """Return everything the adapter's bytes depend on."""
    return {
        "base": base.fingerprint,
        "data": data.digest,
        "system": recipe.task.system,
        "method": recipe.method.settings,
        "train": asdict(recipe.train),
        "rows": rows.lineage,
        "seed": recipe.seed,
        "hardware": asdict(hardware),
        "processes": process_count(),
        "versions": versions_of(recipe),
    }


def _first_batches(rows: Rows, pad_id: int) -> list[Batch]:
    """Return rows of the schedule in batches, for what looks at data before the first step."""
    chosen = [rows.sample(i) for i in range(min(len(rows.train), FIRST_ROWS))]
    return [collate(chosen[i : i + 32], pad_id) for i in range(0, len(chosen), 32)]


def _fit(
    recipe: Recipe,
    model: Any,
    rows: Rows,
    prompter: Prompter,
    run: Run,
    hardware: Hardware,
    progress: Report,
) -> None:
    """Run the remaining steps; with early stopping the best weights are loaded at the end."""
    checkpoint = run.last_checkpoint()
    callbacks = callbacks_for(recipe.train, run, checkpoint, progress) + trackers(recipe, run)
    arguments = trainer_arguments(recipe, run, hardware)
    if recipe.preference is not None:
        trainer = preference_trainer(
            model, arguments, recipe.preference, rows.train, prompter, callbacks
        )
    else:
        trainer = Trainer(
            model=model,
            args=one_device(TrainingArguments(**arguments)),
            train_dataset=rows.train,
            eval_dataset=list(rows.validation) or None,  # type: ignore[arg-type]  # it only asks for length and items
            data_collator=partial(collate, pad_id=prompter.end_of_turn),
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)
    with own_progress_only():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
