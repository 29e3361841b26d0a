"""How much faster recipes are trained together than one after another.

    python -m benchmarks.train_together [RECIPE ...] [--tenants 4 8] [--batch 1 2]

Each tenant takes one of the recipes in turn, with a seed of its own. Both ways run the real
`train` and `train_together` on the same rows, one repeat of each in turn. A step's time is from
one report of progress to the next, so loading and writing are outside. Prints the median of the
repeats' ratios, in wall and in processor seconds, with the lowest and the highest.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from registry.base import BaseModel, Bases
from registry.home import default_cache
from training.data.load import load_data
from training.model import Hardware, detect_hardware
from training.progress import Progress
from training.recipe import apply_overrides, load_recipe
from training.together.train import Job, train_together
from training.train import train

RECIPES = (Path("adapters/smart-home"), Path("adapters/icd-10"))
WARM_UP = 1  # steps that are not counted: memory is touched for the first time
Times = tuple[float, float]  # wall and processor seconds


class Clock:
    """Takes the time whenever one run reports a step."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name  # whose reports count; the others of the batch come just before
        self._marks: list[Times] = []

    def report(self, progress: Progress) -> None:
        if progress.stage == "train" and self._name in (None, progress.text):
            self._marks.append((time.perf_counter(), time.process_time()))

    def step(self) -> Times:
        """Return the median step."""
        counted = self._marks[WARM_UP:]
        pairs = list(pairwise(counted))
        wall, cpu = (statistics.median(b[i] - a[i] for a, b in pairs) for i in (0, 1))
        return wall, cpu


def make_jobs(places: Sequence[Path], tenants: int, batch: int, steps: int) -> list[Job]:
    jobs = []
    for number in range(tenants):
        recipe = load_recipe(places[number % len(places)])
        changes = {
            "name": f"tenant-{number}/{recipe.name.partition('/')[2]}",
            "seed": number,
            "train.steps": steps + WARM_UP,
            "train.batch_size": batch,
            "train.save_every": 1_000_000,
        }
        recipe = apply_overrides(recipe, [f"{key}={value}" for key, value in changes.items()])
        jobs.append(Job(recipe, load_data(recipe)))
    return jobs


def one_by_one(jobs: Sequence[Job], base: BaseModel, hardware: Hardware, runs: Path) -> Times:
    steps: list[Times] = []
    for job in jobs:
        clock = Clock()
        train(
            job.recipe, job.data, base, runs, progress=clock.report, show=_quiet, hardware=hardware
        )
        steps.append(clock.step())
    return sum(wall for wall, _ in steps), sum(cpu for _, cpu in steps)


def together(jobs: Sequence[Job], base: BaseModel, hardware: Hardware, runs: Path) -> Times:
    clock = Clock(jobs[-1].recipe.name)
    train_together(jobs, base, runs, progress=clock.report, show=_quiet, hardware=hardware)
    return clock.step()


def measure(
    way: Callable[[Sequence[Job], BaseModel, Hardware, Path], Times],
    jobs: Sequence[Job],
    base: BaseModel,
    hardware: Hardware,
) -> Times:
    with tempfile.TemporaryDirectory() as runs:
        return way(jobs, base, hardware, Path(runs))


def _quiet(*_: object) -> None:
    pass


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="*", default=list(RECIPES))
    parser.add_argument("--tenants", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=5, help="counted, in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = detect_hardware()
    dtype = found.dtype if options.dtype == "auto" else options.dtype
    hardware = Hardware(found.device, dtype, found.threads)
    base = Bases(default_cache() / "bases").get(load_recipe(options.recipes[0]).base)
    print(f"{base.id}, {hardware}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}")
    print("| tenants | batch | alone, CPU s | together, CPU s | ratio, CPU | ratio, wall |")
    print("|---|---|---|---|---|---|")
    for tenants in options.tenants:
        for batch in options.batch:
            jobs = make_jobs(options.recipes, tenants, batch, options.steps)
            pairs = [
                (measure(one_by_one, jobs, base, hardware), measure(together, jobs, base, hardware))
                for _ in range(options.repeats)
            ]
            row = [
                f"{statistics.median(alone[1] for alone, _ in pairs):.2f}",
                f"{statistics.median(mixed[1] for _, mixed in pairs):.2f}",
                _spread([alone[1] / mixed[1] for alone, mixed in pairs]),
                _spread([alone[0] / mixed[0] for alone, mixed in pairs]),
            ]
            print(f"| {tenants} | {batch} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
