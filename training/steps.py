"""What happens after each training step: a line of metrics, a report, a check, a mark."""

# ruff: noqa: ARG002  # transformers fixes the signatures of a callback
import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.errors import RunFailed
from training.processes import is_first_process, wait_for_all
from training.progress import Progress, Report
from training.recipe import Train
from training.run import COMPLETE, Run


def callbacks_for(
    settings: Train, run: Run, checkpoint: Path | None, progress: Report
) -> list[TrainerCallback]:
    """Return what watches a run that goes on from a checkpoint; only the first process writes."""
    callbacks: list[TrainerCallback] = [Checkpoints(settings.save_every)]
    if settings.patience is not None:
        callbacks.append(EarlyStop(settings.patience))
    if is_first_process():
        seconds = run.forget_after(checkpoint)
        callbacks.append(StepLog(run.metrics, settings.steps, seconds, progress))
    return callbacks


class StepLog(TrainerCallback):
    """Writes metrics.jsonl and reports progress; stops a run whose loss is not finite."""

    def __init__(self, path: Path, total: int, seconds_before: float, progress: Report) -> None:
        self._path = path
        self._total = total
        self._before = seconds_before  # spent by earlier, interrupted processes
        self._progress = progress
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()
        self._first_step = state.global_step
        self._progress(Progress("train", state.global_step, self._total))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs, step = logs or {}, state.global_step
        spent = time.monotonic() - self._started
        seconds = round(self._before + spent, 3)
        if "eval_loss" in logs:
            loss = _finite(logs["eval_loss"], "validation loss", step, args)
            self._write({"step": step, "validation_loss": loss, "seconds": seconds})
        if "loss" not in logs:
            return  # a validation, or the summary at the end
        loss = _finite(logs["loss"], "loss", step, args)
        line = {
            "step": step,
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
        }
        if "rewards/margins" in logs:
            line["margin"] = logs["rewards/margins"]
        self._write(line | {"seconds": seconds})
        eta = spent / (step - self._first_step) * (self._total - step)
        self._progress(Progress("train", step, self._total, loss=loss, eta_seconds=eta))

    def _write(self, line: dict[str, float]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so many steps, and marks it once it is whole.

    The Trainer writes the files of a checkpoint one after the other, each process its own.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0:
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        wait_for_all()
        if is_first_process():
            checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
            (checkpoint / COMPLETE).touch()


class EarlyStop(TrainerCallback):
    """Ends a run whose validation loss was not better for so many looks.

    It counts in the Trainer's history, which every checkpoint holds, so a resumed run counts on.
    No checkpoint is written where it ends: a run resumed from there would go on.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if len(losses) - 1 - losses.index(min(losses)) >= self._patience:
            control.should_training_stop = True
            control.should_save = False


def _finite(loss: float, name: str, step: int, args: TrainingArguments) -> float:
    if not math.isfinite(loss):
        raise RunFailed(
            f"The {name} is {loss} at step {step}. Lower train.learning_rate "
            f"({args.learning_rate:g}) or train.max_grad_norm ({args.max_grad_norm:g})."
        )
    return loss
