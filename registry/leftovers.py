"""What dead processes left behind: half-made files and folders, known by their age."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path

STALE_SECONDS = 3600  # what a living process is still making is younger


def sweep(paths: Iterable[Path]) -> None:
    """Delete the stale ones among these files and folders. Several processes may sweep at once."""
    for path in paths:
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            continue  # its owner is alive and has just finished, or another process swept it
        if age <= STALE_SECONDS:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
