"""One training run in a process of its own, so that what it takes can be measured.

A process that trained one model still holds memory of it while it trains the next, and its
children's peaks count theirs in; so every run gets a fresh process, forked from one that has done
nothing but import.
"""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from registry.base import BaseModel
from registry.errors import WardrobeError
from training.data.examples import Data
from training.errors import RunFailed
from training.evaluation.memory import remembered
from training.progress import Progress, Report
from training.recipe import Recipe
from training.run import replace_file
from training.train import TrainedAdapter, train

COST_FILE = "cost.json"  # in the run's folder, beside its metrics


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run took, from the start of its process to its finished adapter."""

    cpu_seconds: float  # over all threads
    seconds: float
    peak_bytes: int  # resident
    gpu_seconds: float | None
    gpu_peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Job:
    """What a run needs."""

    recipe: Recipe
    data: Data
    base: BaseModel
    runs: Path
    answers: Path  # what the base said before, for [replay]: nobody can be asked in that process


def train_apart(job: Job, progress: Report) -> TrainedAdapter:
    """Train in a process of its own, or find the run again. Raises what `train` raises."""
    context = get_context("forkserver")
    start_server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, theirs), daemon=True)
    with _main_left_alone():
        process.start()
    theirs.close()
    result = None
    try:
        result = _listen(ours, progress)
    finally:
        if result is None:
            process.terminate()
        process.join()
    if result is None:
        raise RunFailed(
            f"The process that trained {job.recipe.method.kind} ended with code "
            f"{process.exitcode}: out of memory? Run the command again to go on."
        )
    if isinstance(result, str):
        raise RunFailed(result)
    return result


def start_server() -> None:
    """Start the process that runs are forked from, once; it imports for seconds.

    Ctrl-C comes to every process of a terminal, and is this one's to tell: it is held back from
    that one until `silent` has made it end without a word.
    """
    resource_tracker.ensure_running()  # or the server would start it, which lets Ctrl-C in again
    forkserver.set_forkserver_preload(["training.comparison.silent", __name__])
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def read_taken(run: Path) -> Taken | None:
    """Return what a run took; None where `wardrobe train` made it, which does not measure that."""
    path = run / COST_FILE
    return Taken(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


@contextmanager
def _main_left_alone() -> Iterator[None]:
    """Hide the main module: a new process would import it again, and run one without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def write_taken(run: Path, taken: Taken) -> None:
    replace_file(run / COST_FILE, json.dumps(asdict(taken)).encode())


def _listen(pipe: Connection, progress: Report) -> TrainedAdapter | str | None:
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return None
        if not isinstance(message, Progress):
            return message
        progress(message)


def work(job: Job, pipe: Connection) -> None:
    """What the other process does: train, tell how it goes, and send what came of it."""
    started, first = time.monotonic(), 0

    def report(progress: Progress) -> None:
        nonlocal first
        if progress.stage == "train" and not first:
            first = progress.done or -1  # a run that goes on starts at its checkpoint
        pipe.send(progress)

    try:
        trained = train(
            job.recipe,
            job.data,
            job.base,
            job.runs,
            progress=report,
            show=lambda _: None,
            answer=remembered(job.answers, job.base, _nobody),
        )
    except WardrobeError as error:
        pipe.send(error.message)
        return
    except BrokenPipeError:  # who asked is gone: interrupted while this process began
        return
    if not trained.reused:
        total = job.recipe.train.steps
        _write(trained.folder.parent, started, total / (total - max(first, 0)))
    pipe.send(trained)


def _write(run: Path, started: float, scale: float) -> None:
    """Write what this process took; of a run that went on, this process saw `1 / scale`."""
    gpu = torch.cuda.is_available()
    seconds = (time.monotonic() - started) * scale
    taken = Taken(
        cpu_seconds=round(time.process_time() * scale, 2),
        seconds=round(seconds, 2),
        peak_bytes=_peak_bytes(),
        gpu_seconds=round(seconds, 2) if gpu else None,
        gpu_peak_bytes=torch.cuda.max_memory_allocated() if gpu else None,
    )
    write_taken(run, taken)


def _peak_bytes() -> int:
    """Return the highest resident memory of this process.

    Linux' VmHWM is of this address space alone; ru_maxrss starts at the peak of the process that
    forked it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _nobody(*_: Any) -> list[list[int]]:
    raise AssertionError("the base was asked before: its answers are in memory")
