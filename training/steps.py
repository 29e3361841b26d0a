"""What happens after each training step: a line of metrics, a report, a check, a mark."""

# ruff: noqa: ARG002  # transformers fixes the signatures of a callback
import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.errors import RunFailed
from training.progress import Progress, Report
from training.run import COMPLETE


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
        if logs is None or "loss" not in logs:
            return  # the summary at the end
        loss, step = logs["loss"], state.global_step
        if not math.isfinite(loss):
            raise RunFailed(
                f"The loss is {loss} at step {step}. Lower train.learning_rate "
                f"({args.learning_rate:g}) or train.max_grad_norm ({args.max_grad_norm:g})."
            )
        spent = time.monotonic() - self._started
        line = {
            "step": step,
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "seconds": round(self._before + spent, 3),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        eta = spent / (step - self._first_step) * (self._total - step)
        self._progress(Progress("train", step, self._total, loss=loss, eta_seconds=eta))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole: the Trainer writes its files one after the other."""
        checkpoint = Path(args.output_dir or "") / f"checkpoint-{state.global_step}"
        (checkpoint / COMPLETE).touch()
