"""Ctrl-C before a command has begun, and in one."""

import subprocess
import sys

import pytest

IMPORT = """
import os, signal, sys

before = getattr(signal, sys.argv[2])
signal.signal(signal.SIGINT, before)  # whatever this process was started with

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
import wardrobe
assert signal.getsignal(signal.SIGINT) == before
print("imported")
"""


def run(module: str, handler: str) -> tuple[int, str, str]:
    """Import the command line, and interrupt it when it comes to `module`."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, module, handler],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("module", ["logging", "sqlalchemy", "training.commands"])
def test_an_interrupt_during_the_imports_is_one_line_and_130(module: str) -> None:
    assert run(module, "default_int_handler") == (130, "", "interrupted\n")


def test_behind_the_imports_ctrl_c_is_an_exception_again() -> None:
    assert run("none", "default_int_handler") == (0, "imported\n", "")


def test_who_ignores_ctrl_c_goes_on_doing_so() -> None:
    """As a job in the background of a shell does."""
    assert run("sqlalchemy", "SIG_IGN") == (0, "imported\n", "")


def test_an_interrupt_in_a_command_says_the_same() -> None:
    script = """
import sys
import wardrobe

@wardrobe.app.command()
def hang() -> None:
    raise KeyboardInterrupt

sys.argv = ["wardrobe", "hang"]
wardrobe.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
