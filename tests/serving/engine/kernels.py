"""Where the Triton kernels can run here: in Triton's interpreter, or on a GPU."""

import os

import pytest
import torch

from serving.engine.ops.triton import attention, lora

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            torch.device("cpu"),
            marks=pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here"),
            id="interpreter",
        ),
        pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda"),
    ],
)


def share_out_to_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give few programs all the work: the interpreter runs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(attention, "PROGRAMS", 1)
        monkeypatch.setattr(lora, "TILE_PROGRAMS", 2)
        monkeypatch.setattr(lora, "RANK_PROGRAMS", 1)
