"""One run among others: its own order, optimiser, schedule, clipping, curve, stop and folder."""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from registry.base import BaseModel
from training.adapter_files import PlainLora, write_lora
from training.batches import Sample
from training.card import fitted_of, new_card, write_card
from training.data.examples import Data
from training.errors import RunFailed
from training.model import Hardware
from training.progress import Progress, Report
from training.recipe import Recipe, Train
from training.rows import Rows
from training.run import COMPLETE, Run, replace_file
from training.together.model import Adapter

STATE_FILE = "state.safetensors"  # of a checkpoint: weights and both moments of the optimiser
FAILED_FILE = "failed.json"


@dataclass(frozen=True, slots=True)
class Member:
    """What one recipe brings along: all that its folder depends on."""

    recipe: Recipe
    data: Data
    base: BaseModel
    hardware: Hardware
    rows: Rows
    run: Run

    @property
    def failed_at(self) -> int | None:
        """Return the step at which this run failed for good, if it did."""
        failure = self.failure
        return failure["step"] if failure else None

    @property
    def failure(self) -> dict[str, Any] | None:
        path = self.run.folder / FAILED_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Tenant:
    """Trains one adapter with the gradients that a mixed batch gave it."""

    def __init__(self, member: Member, adapter: Adapter, step: int, progress: Report) -> None:
        """Go on after `step`, from the checkpoint that is there; 0 starts anew."""
        settings = member.recipe.train
        self.member = member
        self.adapter = adapter
        self.step = step
        self._progress = progress
        self._optimizer = torch.optim.AdamW(
            [adapter.flat],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._share = _schedule(settings, self._optimizer)
        checkpoint = self._checkpoint(step) if step else None
        if checkpoint:
            self._restore(checkpoint)
        self._before = member.run.forget_after(checkpoint)
        self._started, self._first = time.monotonic(), step
        (member.run.folder / FAILED_FILE).unlink(missing_ok=True)  # it fails again, if it does
        self._report()

    @property
    def done(self) -> bool:
        return self.step == self.member.recipe.train.steps

    def batch(self) -> Sequence[Sample]:
        """Return the rows of the next step, in the order that this recipe has alone."""
        size = self.member.recipe.train.batch_size
        first = self.step * size
        return [self.member.rows.sample(row) for row in range(first, first + size)]

    def learn(self, loss: float) -> None:
        """Take one step with the gradient that is there, and clear it. Raises RunFailed."""
        settings = self.member.recipe.train
        if not math.isfinite(loss):
            self._fail(loss)
        rate = settings.learning_rate * self._share(self.step)
        self._optimizer.param_groups[0]["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_([self.adapter.flat], settings.max_grad_norm)
        self._optimizer.step()
        self.adapter.clear_gradient()
        self.step += 1
        line = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "seconds": round(self._before + time.monotonic() - self._started, 3),
        }
        with self.member.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._report(loss)

    def save(self) -> None:
        """Write a checkpoint beside the one before: a resumed group needs one step of all."""
        folder = self._checkpoint(self.step)
        folder.mkdir(parents=True, exist_ok=True)
        moments = self._optimizer.state[self.adapter.flat]
        state = {
            "weights": self.adapter.flat.detach(),
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
        }
        save_file({name: part.cpu() for name, part in state.items()}, folder / STATE_FILE)
        (folder / COMPLETE).touch()

    def forget_before(self) -> None:
        """Drop the checkpoints before the newest, once every other tenant has that one, too."""
        newest = self._checkpoint(self.step)
        for folder in self.member.run.checkpoints.glob("checkpoint-*"):
            if folder != newest:
                shutil.rmtree(folder)

    def publish(self) -> None:
        """Write the finished adapter with its card; it appears in one rename."""
        member, run = self.member, self.member.run
        prepared = run.prepare()
        method = member.recipe.method
        lora = PlainLora(
            self.adapter.state(),
            method.r,
            method.alpha,
            self.adapter.targets,
            use_rslora=method.kind == "rslora",
        )
        write_lora(lora, member.base.id, prepared)
        write_card(prepared, new_together_card(member))
        run.publish(prepared)

    def _restore(self, checkpoint: Path) -> None:
        state = load_file(checkpoint / STATE_FILE, device=str(self.adapter.flat.device))
        self.adapter.flat.data.copy_(state["weights"])
        self._optimizer.state[self.adapter.flat] = {
            "step": torch.tensor(float(self.step), device=self.adapter.flat.device),
            "exp_avg": state["exp_avg"],
            "exp_avg_sq": state["exp_avg_sq"],
        }

    def _fail(self, loss: float) -> None:
        settings = self.member.recipe.train
        message = (
            f"{self.member.recipe.name}: the loss is {loss} at step {self.step + 1}. Lower "
            f"train.learning_rate ({settings.learning_rate:g}) or train.max_grad_norm "
            f"({settings.max_grad_norm:g})."
        )
        failure = {"step": self.step, "message": message}
        replace_file(self.member.run.folder / FAILED_FILE, json.dumps(failure).encode())
        raise RunFailed(message)

    def _checkpoint(self, step: int) -> Path:
        return self.member.run.checkpoints / f"checkpoint-{step}"

    def _report(self, loss: float | None = None) -> None:
        total, taken = self.member.recipe.train.steps, self.step - self._first
        spent = time.monotonic() - self._started
        eta = spent / taken * (total - self.step) if taken else None
        name = self.member.recipe.name
        self._progress(Progress("train", self.step, total, name, loss=loss, eta_seconds=eta))


def new_together_card(member: Member) -> dict[str, Any]:
    """Return the card of a finished run; its lineage says who else was in its batches, by run."""
    fitted = fitted_of(member.run.read_metrics(), best=False)
    lineage = {**member.rows.lineage, "together": member.run.facts["together"]}
    return new_card(member.recipe, member.data, member.base, member.hardware, fitted, lineage, None)


def _schedule(settings: Train, optimizer: torch.optim.Optimizer) -> Any:
    """Return step → share of the learning rate, as the Trainer has it."""
    name = settings.schedule if settings.schedule != "constant" else "constant_with_warmup"
    warmup = math.ceil(settings.warmup * settings.steps)
    return get_scheduler(name, optimizer, warmup, settings.steps).lr_lambdas[0]  # type: ignore[attr-defined]  # these are all LambdaLR
