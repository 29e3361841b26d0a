"""One training run in one folder: what it is, how far it got, and whether it is finished.

    <runs>/<key>/run.json            what the run depends on; the key is its hash
                 metrics.jsonl       one line a step, one a look at the validation loss
                 loss.svg            the same as a picture
                 checkpoints/        only while it is unfinished
                 adapter/            only when it is finished: it appears in one rename

The same recipe, data, base, versions and hardware give the same key, so a finished run is found
again, an interrupted one is continued, and a changed recipe never mixes with an old checkpoint.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from registry.durable import sync
from registry.jsonfile import canonical
from training.errors import RunFailed
from training.processes import is_first_process, wait_for_all

COMPLETE = "complete"  # written into a checkpoint after everything else


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def curve(self) -> Path:
        return self.folder / "loss.svg"

    @property
    def trackers(self) -> Path:
        """Where TensorBoard's events go; the other trackers have places of their own."""
        return self.folder / "tensorboard"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def finished(self) -> bool:
        return self.adapter.is_dir()

    def last_checkpoint(self) -> Path | None:
        """Return the newest whole checkpoint; one that was being written does not count."""
        whole = [path.parent for path in self.checkpoints.glob(f"checkpoint-*/{COMPLETE}")]
        return max(whole, key=_step_of, default=None)

    @property
    def last_step(self) -> int:
        """Return the step of the newest whole checkpoint; 0 without one."""
        checkpoint = self.last_checkpoint()
        return _step_of(checkpoint) if checkpoint else 0

    def forget_after(self, checkpoint: Path | None) -> float:
        """Drop half-made checkpoints and later metrics; return the seconds already spent."""
        step = _step_of(checkpoint) if checkpoint else 0
        for path in self.checkpoints.glob("checkpoint-*"):
            if _step_of(path) > step or not (path / COMPLETE).exists():
                shutil.rmtree(path)
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self.metrics, text.encode())
        return kept[-1]["seconds"] if kept else 0.0

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines written so far; a line cut off by a crash is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def prepare(self) -> Path:
        """Return an empty folder for what is to be published."""
        prepared = self.folder / "adapter.partial"
        shutil.rmtree(prepared, ignore_errors=True)
        prepared.mkdir()
        return prepared

    def publish(self, prepared: Path) -> None:
        """Let the finished adapter appear, then drop what only resuming needed."""
        for path in prepared.iterdir():
            sync(path)
        sync(prepared)
        prepared.rename(self.adapter)
        sync(self.folder)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def key_of(facts: Mapping[str, Any]) -> str:
    """Name the run that depends on these facts."""
    return hashlib.sha256(canonical(facts)).hexdigest()[:16]


@contextmanager
def open_run(runs: Path, facts: Mapping[str, Any]) -> Iterator[Run]:
    """Open, and hold, the run of these facts. Raises RunFailed when another run holds it.

    Of several processes of one run the first holds it, and the others wait until it does.
    """
    run = Run(runs / key_of(facts), facts)
    if not is_first_process():
        wait_for_all()
        yield run
        return
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunFailed(
            f"Another process is training this very recipe in {run.folder}. Wait for it, or end it."
        ) from None
    try:
        replace_file(run.folder / "run.json", json.dumps(facts, indent=2).encode())
        wait_for_all()
        yield run
    finally:
        lock.release()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is either the old or the new one, whenever the power goes."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
