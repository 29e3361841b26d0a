"""The process that the runs of a comparison are forked from."""

import re
import signal
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest

from registry.base import BaseModel
from training.comparison.worker import Job, start_server, work
from training.data.examples import Data
from training.recipe import Recipe


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc here")
def test_ctrl_c_is_held_back_from_the_process_that_runs_are_forked_from() -> None:
    """It would print the traceback of its imports, which take seconds."""
    start_server()
    [server] = [
        child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())
    ]
    for status, held in ((f"/proc/{server.pid}/status", True), ("/proc/self/status", False)):
        found = re.search(r"SigBlk:\s*(\w+)", Path(status).read_text())
        assert found is not None
        assert bool(int(found[1], 16) >> (signal.SIGINT - 1) & 1) is held, status


def test_a_run_whose_asker_is_gone_ends_without_a_word(
    tiny_base: BaseModel, data: Data, recipe: Recipe, tmp_path: Path
) -> None:
    ours, theirs = Pipe(duplex=False)
    ours.close()
    before = signal.getsignal(signal.SIGINT)
    try:
        work(Job(recipe, data, tiny_base, tmp_path / "runs", tmp_path / "answers"), theirs)
    finally:
        signal.signal(signal.SIGINT, before)
