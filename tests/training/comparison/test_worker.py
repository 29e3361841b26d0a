"""The process that the runs of a comparison are forked from."""

import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import psutil

from registry.base import BaseModel
from training.comparison.worker import Job, start_server, work
from training.data.examples import Data
from training.recipe import Recipe


def test_ctrl_c_ends_what_is_importing_at_once_and_without_a_word() -> None:
    """Also one that came before, and was held back."""
    held_back = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); "
        "os.kill(os.getpid(), signal.SIGINT); import training.comparison.silent; print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", held_back], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_the_process_that_runs_are_forked_from_is_silent_before_it_imports_anything_else() -> None:
    start_server()
    [command] = [
        line
        for child in psutil.Process().children()
        if "forkserver" in (line := " ".join(child.cmdline()))
    ]
    assert "['training.comparison.silent', 'training.comparison.worker']" in command
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_run_whose_asker_is_gone_ends_without_a_word(
    tiny_base: BaseModel, data: Data, recipe: Recipe, tmp_path: Path
) -> None:
    ours, theirs = Pipe(duplex=False)
    ours.close()
    work(Job(recipe, data, tiny_base, tmp_path / "runs", tmp_path / "answers"), theirs)
