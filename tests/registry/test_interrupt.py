"""Ctrl-C before a command has begun."""

import subprocess
import sys

import pytest

IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
import wardrobe
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("imported")
"""


@pytest.mark.parametrize("module", ["logging", "sqlalchemy", "training.commands"])
def test_an_interrupt_during_the_imports_is_one_line_and_130(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, module], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_behind_the_imports_ctrl_c_is_an_exception_again() -> None:
    command = [sys.executable, "-c", IMPORT, "none"]
    assert subprocess.run(command, capture_output=True, check=False).stdout == b"imported\n"
