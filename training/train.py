"""The training run: a recipe and its data in, an adapter folder out."""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from registry.base import BaseModel
from training.batches import MaskedSample, Schedule, collate, encode_examples, masked_sample
from training.card import new_card, read_card, write_card
from training.conversion import starting_weights
from training.data.examples import Data
from training.model import Batch, Hardware, check_runnable, detect_hardware, load_model
from training.progress import Report, own_progress_only
from training.prompt import load_prompter
from training.recipe import Recipe
from training.results import write_result
from training.run import Run, open_run
from training.steps import StepLog

FIRST_ROWS = 128  # that EVA looks at


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A finished run: a folder the registry takes, and what it says about itself."""

    folder: Path  # adapter_config.json, adapter_model.safetensors, wardrobe.json
    card: dict[str, Any]
    dropped: int  # examples too long, where the recipe says to drop them
    reused: bool  # the very same run was finished before


def train(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    runs: Path,
    *,
    progress: Report,
    show: Callable[[MaskedSample], None],
    hardware: Hardware | None = None,
) -> TrainedAdapter:
    """Train, or continue, or find again, the run of this recipe in a folder under `runs`.

    `show` gets what the first training row looks like to the loss, before the first step.
    Equal recipe, data, base, versions and hardware give equal bytes, also after an interruption.
    The card has no metrics yet: `training.evaluation.evaluate` judges the adapter and completes it.
    Raises DataError, RunFailed, BaseUnavailable.
    """
    hardware = hardware or detect_hardware()
    check_runnable(recipe.method, hardware)
    prompter = load_prompter(base.path, recipe.task.system)
    samples, dropped = encode_examples(data.train, prompter, recipe.train)
    show(masked_sample(samples, prompter))
    with open_run(runs, run_facts(recipe, data, base, hardware)) as run:
        reused = run.finished
        if not reused:
            rows = Schedule(samples, recipe.train.steps * recipe.train.batch_size, recipe.seed)
            first = _first_batches(rows, prompter.end_of_turn)
            model = load_model(base.path, recipe.method, hardware, recipe.seed, first)
            start = starting_weights(model, recipe.method)
            seconds, loss = _fit(recipe, model, rows, prompter.end_of_turn, run, hardware, progress)
            prepared = run.folder / "adapter.partial"
            shutil.rmtree(prepared, ignore_errors=True)
            conversion = write_result(model, recipe.method, start, base, prepared)
            card = new_card(recipe, data, base, hardware, seconds, loss, conversion)
            write_card(prepared, card)
            run.publish(prepared)
        card = _card_of(run.adapter, recipe, data, base, hardware)
        return TrainedAdapter(run.adapter, card, dropped, reused)


def _card_of(
    folder: Path, recipe: Recipe, data: Data, base: BaseModel, hardware: Hardware
) -> dict[str, Any]:
    """Return the adapter's card; start it anew when the recipe judges or names it differently now.

    A gate or a metric changes no weight, so the run is found again; its old verdict must not be.
    """
    card = read_card(folder)
    lineage = card["lineage"]
    if lineage["recipe_sha256"] != recipe.digest:
        seconds, loss = lineage["seconds"], lineage["final_loss"]
        conversion = lineage.get("conversion")
        card = new_card(recipe, data, base, hardware, seconds, loss, conversion)
        write_card(folder, card)
    return card


def run_facts(recipe: Recipe, data: Data, base: BaseModel, hardware: Hardware) -> dict[str, Any]:
    """Return everything the adapter's bytes depend on."""
    return {
        "base": base.fingerprint,
        "data": data.digest,
        "system": recipe.task.system,
        "method": recipe.method.settings,
        "train": asdict(recipe.train),
        "seed": recipe.seed,
        "hardware": asdict(hardware),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _first_batches(rows: Schedule, pad_id: int) -> list[Batch]:
    """Return rows of the schedule in batches, for what looks at data before the first step."""
    chosen = [rows[i] for i in range(min(len(rows), FIRST_ROWS))]
    return [collate(chosen[i : i + 32], pad_id) for i in range(0, len(chosen), 32)]


def _fit(
    recipe: Recipe,
    model: Any,
    rows: Schedule,
    pad_id: int,
    run: Run,
    hardware: Hardware,
    progress: Report,
) -> tuple[float, float]:
    """Run the remaining steps; return the seconds of the whole run and its last loss."""
    checkpoint = run.last_checkpoint()
    log = StepLog(run.metrics, recipe.train.steps, run.forget_after(checkpoint), progress)
    trainer = Trainer(
        model=model,
        args=training_arguments(recipe, run.checkpoints, hardware),
        train_dataset=rows,
        data_collator=partial(collate, pad_id=pad_id),
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    with own_progress_only():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    last = run.read_metrics()[-1]
    return last["seconds"], last["loss"]


def training_arguments(recipe: Recipe, folder: Path, hardware: Hardware) -> TrainingArguments:
    """Translate the recipe; everything that could differ between two runs is set here."""
    settings = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule
        if settings.schedule != "constant"
        else "constant_with_warmup",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        bf16=hardware.autocast(recipe.method.kind),
        use_cpu=hardware.device == "cpu",
        full_determinism=hardware.device == "cuda",
        seed=recipe.seed,
        data_seed=recipe.seed,
        train_sampling_strategy="sequential",  # the schedule is the order
        remove_unused_columns=False,
        dataloader_pin_memory=hardware.device == "cuda",
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite must be seen
        report_to="none",
        disable_tqdm=True,
    )
