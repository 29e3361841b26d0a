"""Where there is no GPU, tests that need one are skipped and Triton's kernels are interpreted."""

import os
from collections.abc import Iterable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when it is imported


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
