"""Seconds of one training step: ours against a plain loop over the same model and batches.

    python -m benchmarks.training_step [--base ID] [--steps 12] [--rounds 3]

Both train LoRA of rank 16 on all linear layers with AdamW, gradient clipping and a linear schedule,
bf16 where the machine has it, on batches of 8 rows of about 50 tokens. `wardrobe` is
`training.train.train` with all it does for a step (metrics, progress); its fixed work before the
first step is not counted, and neither are checkpoints. The two take turns in one process, and CPU
seconds are compared, which a busy machine changes less than wall time.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

from registry.base import BaseModel, Bases
from registry.home import default_cache
from training.batches import collate
from training.data.examples import Data, ask, digest_examples
from training.model import detect_hardware, load_model
from training.progress import Progress
from training.prompt import load_prompter
from training.recipe import Recipe, parse_recipe
from training.replay import Replayed
from training.rows import make_rows
from training.train import train

WARMED = 2  # steps before the clock starts


@dataclass(frozen=True, slots=True)
class Clock:
    """One moment: seconds on the wall, and of CPU by every thread of this process."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.perf_counter(), time.process_time())

    def per_step(self, before: "Clock", steps: int) -> "Clock":
        return Clock((self.wall - before.wall) / steps, (self.cpu - before.cpu) / steps)


def requests() -> Data:
    """Return rows of the shape of the smart-home recipe: a request and a short JSON."""
    rooms = ("kitchen", "bedroom", "office", "hall", "garage", "cellar", "attic", "garden")
    rows = tuple(
        ask(
            f"Please turn the {colour} light in the {room} {state}",
            f'{{"intent":"Turn{state.title()}","slots":{{"name":"{colour}","area":"{room}"}}}}',
            room,
        )
        for room in rooms
        for colour in ("red", "blue", "small", "old")
        for state in ("on", "off")
    )
    return Data(rows, rows[:1], 0, digest_examples(rows, rows[:1]))


def make_recipe(base: BaseModel, steps: int) -> Recipe:
    value = {
        "name": "bench/step",
        "base": base.id,
        "data": {"path": "unused.csv"},
        "task": {"system": "Turn the smart-home request into JSON.", "metric": "json"},
        "train": {"steps": steps, "save_every": 1_000_000},
    }
    return parse_recipe(value, Path())


def time_ours(recipe: Recipe, data: Data, base: BaseModel) -> Clock:
    moments: dict[int, Clock] = {}

    def note(told: Progress) -> None:
        moments[told.done] = Clock.now()

    with TemporaryDirectory() as runs:
        train(recipe, data, base, Path(runs), progress=note, show=lambda _: None)
    last = recipe.train.steps
    return moments[last].per_step(moments[WARMED], last - WARMED)


def time_plain(recipe: Recipe, data: Data, base: BaseModel) -> Clock:
    settings, hardware = recipe.train, detect_hardware()
    model = load_model(base.path, recipe.method, hardware, recipe.seed, ())
    model = model.to(hardware.device)
    bf16 = hardware.autocast(recipe.method.kind)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    start = Clock.now()
    for step, batch in enumerate(batches(recipe, data, base)):
        if step == WARMED:
            start = Clock.now()
        with torch.autocast(hardware.device, torch.bfloat16, enabled=bf16):
            loss = model(**{key: value.to(hardware.device) for key, value in batch.items()}).loss
        loss.backward()
        clip_grad_norm_(weights, settings.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        float(loss.detach())  # a loop that is watched reads it, too
    return Clock.now().per_step(start, settings.steps - WARMED)


def batches(recipe: Recipe, data: Data, base: BaseModel) -> Iterator[dict[str, Any]]:
    prompter = load_prompter(base.path, recipe.task.system)
    rows = make_rows(recipe, data, prompter, Replayed((), {})).train
    size = recipe.train.batch_size
    for start in range(0, len(rows), size):
        yield collate([rows[start + place] for place in range(size)], prompter.end_of_turn)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    arguments = parser.parse_args()
    base = Bases(default_cache() / "bases").get(arguments.base)
    recipe, data = make_recipe(base, arguments.steps + WARMED), requests()
    hardware = detect_hardware()
    print(f"{base.id} on {hardware.device}, {hardware.dtype}, {hardware.threads} threads")
    print("round   wardrobe CPU s  wall s   plain CPU s  wall s   ratio of CPU")
    ratios: list[float] = []
    for number in range(1, arguments.rounds + 1):
        ours, plain = time_ours(recipe, data, base), time_plain(recipe, data, base)
        ratios.append(ours.cpu / plain.cpu)
        print(
            f"{number:5}   {ours.cpu:14.3f}  {ours.wall:6.3f}   {plain.cpu:11.3f}  "
            f"{plain.wall:6.3f}   {ratios[-1]:12.3f}",
            flush=True,
        )
    print(
        f"median ratio of CPU seconds a step: {statistics.median(ratios):.3f} (at most 1.1 wanted)"
    )


if __name__ == "__main__":
    main()
