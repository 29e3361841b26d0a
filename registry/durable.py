"""What is on the disk when it is said to be."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until what is in a file, or which names are in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
