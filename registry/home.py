"""Where wardrobe keeps its own files on this machine."""

import os
from pathlib import Path

import platformdirs


def default_home() -> Path:
    """Return the folder of the store: $WARDROBE_HOME, else the user's data directory."""
    if moved := os.environ.get("WARDROBE_HOME"):
        return Path(moved).expanduser()
    return platformdirs.user_data_path("wardrobe", appauthor=False)


def default_cache() -> Path:
    """Return the folder of what can be made again: $WARDROBE_CACHE, else the user's cache.

    Base models live in its sub-folder `bases`.
    """
    if moved := os.environ.get("WARDROBE_CACHE"):
        return Path(moved).expanduser()
    return platformdirs.user_cache_path("wardrobe", appauthor=False)
