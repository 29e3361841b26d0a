"""Runs that die anywhere end with the bytes of a run that did not."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.base import BaseModel
from tests.training.answers import answer_with_transformers
from tests.training.test_train import FP32, bytes_of, quiet
from training.data.examples import Data, ask
from training.progress import Progress
from training.recipe import Recipe, parse_recipe
from training.train import TrainedAdapter, train

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 24


def everything(folder: Path) -> Recipe:
    """Return a recipe with all that has a state: dropout, noise, replay, early stopping."""
    (folder / "general.txt").write_text("How are you?\nWhat is tea?\nWho is there?\n")
    return parse_recipe(
        {
            "name": "acme/colours",
            "base": "local/tiny",
            "data": {"path": "unused.csv"},
            "task": {"system": "Say the colour.", "metric": "label"},
            "method": {"r": 4, "dropout": 0.2},
            "train": {
                "steps": STEPS,
                "batch_size": 2,
                "save_every": 4,
                "eval_every": 3,
                "patience": 6,
                "neftune_alpha": 5.0,
            },
            "replay": {"share": 0.25, "source": "general.txt", "max_new_tokens": 8},
        },
        folder,
    )


def colours() -> Data:
    train = tuple(ask(f"grass {n}", "green" if n % 2 else "blue", str(n)) for n in range(9))
    held_out = (ask("grass 10", "green", "10"),)
    return Data(train, held_out, 0, "digest", (ask("grass 20", "green", "20"),))


def run_everything(
    base: BaseModel, folder: Path, runs: Path, progress: Callable[[Progress], None] = quiet
) -> TrainedAdapter:
    return train(
        everything(folder),
        colours(),
        base,
        runs,
        progress=progress,
        show=quiet,
        hardware=FP32,
        answer=answer_with_transformers,
    )


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from registry.base import Bases
from tests.training.test_resume import run_everything
bases, folder, runs = map(Path, sys.argv[1:])
say = lambda told: told.stage == "train" and print(told.done, flush=True)
run_everything(Bases(bases).get("local/tiny"), folder, runs, say)
"""


def run_and_kill(base: BaseModel, folder: Path, runs: Path, step: int) -> None:
    """Start the run in a process of its own and kill that when it reports the step."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, base.path.parent, folder, runs],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) >= step:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL


def test_a_run_killed_twice_with_sigkill_ends_with_the_same_bytes(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    for step in (10, 17):
        run_and_kill(tiny_base, tmp_path, tmp_path / "killed", step)
    steps: list[int] = []
    killed = run_everything(
        tiny_base, tmp_path, tmp_path / "killed", lambda told: steps.append(told.done)
    )
    assert steps[-1] == STEPS
    assert 0 < min(step for step in steps if step) <= 17
    unbroken = run_everything(tiny_base, tmp_path, tmp_path / "unbroken")
    assert bytes_of(killed) == bytes_of(unbroken)
    assert killed.card["lineage"]["best_step"] == unbroken.card["lineage"]["best_step"]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(
    seed: int, tiny_base: BaseModel, tmp_path: Path
) -> None:
    for step in sorted(random.Random(seed).sample(range(1, STEPS), 3)):
        run_and_kill(tiny_base, tmp_path, tmp_path / "killed", step)
    killed = run_everything(tiny_base, tmp_path, tmp_path / "killed")
    unbroken = run_everything(tiny_base, tmp_path, tmp_path / "unbroken")
    assert bytes_of(killed) == bytes_of(unbroken)


def broken_at(base: BaseModel, folder: Path, runs: Path, step: int) -> Path:
    """Interrupt a run at a step; return the folder of its checkpoints."""

    def die(told: Progress) -> None:
        if told.stage == "train" and told.done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_everything(base, folder, runs, die)
    return next(runs.glob("*/checkpoints"))


@pytest.mark.parametrize("lost", ["rng_state.pth", "optimizer.pt", None])
def test_a_checkpoint_holds_what_equal_bytes_need(
    lost: str | None, tiny_base: BaseModel, tmp_path: Path
) -> None:
    """Without its random state, or its optimiser's, the resumed run differs: both are needed."""
    unbroken = run_everything(tiny_base, tmp_path, tmp_path / "unbroken")
    checkpoints = broken_at(tiny_base, tmp_path, tmp_path / "broken", 11)
    for path in checkpoints.glob(f"checkpoint-*/{lost}"):
        path.unlink()
    resumed = run_everything(tiny_base, tmp_path, tmp_path / "broken")
    assert (bytes_of(resumed)[0] == bytes_of(unbroken)[0]) == (lost is None)
