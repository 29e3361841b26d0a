"""Ctrl-C, in a command and while its modules are imported, which takes half a second."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager

INTERRUPTED = 130  # as shells count a process that SIGINT ended


@contextmanager
def leaving_when_interrupted() -> Generator[None]:
    """End the process at once, with a line and no traceback. Nothing has begun that could suffer.

    By the signal itself: an exception could be swallowed or wrapped by what is being imported.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def said_interrupted() -> int:
    """Say that Ctrl-C ended the command; return its exit status."""
    os.write(2, b"interrupted\n")
    return INTERRUPTED


def _leave(*_: object) -> None:
    os._exit(said_interrupted())
