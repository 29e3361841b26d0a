"""Progress: one fact that long work reports, and quiet for libraries that would draw their own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

Stage = Literal[
    "download",
    "convert",
    "check",
    "generate",
    "replay",
    "train",
    "extract",
    "evaluate",
    "compare",
    "sweep",
]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one piece of work is."""

    stage: Stage
    done: int
    total: int  # 0 when it is not known yet
    text: str = ""  # what is being done, for people
    loss: float | None = None  # of the last step, in training
    eta_seconds: float | None = None


Report = Callable[[Progress], None]


@contextmanager
def own_progress_only() -> Iterator[None]:
    """Keep transformers and huggingface_hub from drawing bars; restore them afterwards."""
    transformers_bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if transformers_bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
