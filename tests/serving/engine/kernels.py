"""Where the Triton kernels can run here: in Triton's interpreter, or on a GPU."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch.testing import assert_close

from serving.engine.kv_cache import BLOCK, blocks_of
from serving.engine.kv_pages import LayerPages
from serving.engine.linear import Linear
from serving.engine.ops.triton import attention, lora
from serving.engine.spec import ModelSpec
from serving.engine.triton_model import TritonModel
from serving.engine.weights import read_weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# It asks numpy for the only number of an array [1], which numpy gives up to 2.3.
TRITON, NUMPY = (
    tuple(int(part) for part in version.split(".")[:2])
    for version in (triton.__version__, np.__version__)
)
BROKEN = TRITON < (3, 7) and NUMPY >= (2, 4)
interpreting = pytest.mark.skipif(
    not INTERPRETED or BROKEN,
    reason=f"Triton {triton.__version__} does not interpret here, with numpy {np.__version__}",
)
on_every_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(torch.device("cpu"), marks=interpreting, id="interpreter"),
        pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda"),
    ],
)

HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {  # relative, absolute
    torch.float32: (1e-5, 2e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 4e-3),
}
in_two_formats = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32"),
        pytest.param(HALF, marks=pytest.mark.long if INTERPRETED else (), id="half"),
    ],
)


def share_out_to_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give few programs all the work: the interpreter runs one after the other."""
    if INTERPRETED:
        monkeypatch.setattr(attention, "PROGRAMS", 1)
        for height, shares in lora.SHARES.items():
            monkeypatch.setitem(lora.SHARES, height, replace(shares, walkers=2, rank_programs=1))


def read_triton(
    base: Path, device: torch.device, length: int, dtype: torch.dtype = torch.float32
) -> TritonModel:
    """Read a base for the Triton operators, also where the engine would not take them."""
    spec = ModelSpec.read(base)
    with torch.inference_mode():
        weights = read_weights(base, spec, dtype, device, Linear)
        return TritonModel(spec, weights, length)


def in_pages(keys: torch.Tensor, values: torch.Tensor) -> LayerPages:
    """Cut keys and values [slots, kv_heads, length, dim] into pages that lie anywhere.

    As many pages are nobody's, and NaN.
    """
    slots, kv_heads, length, dim = keys.shape
    room = blocks_of(length)
    order = torch.randperm(2 * slots * room)[: slots * room].to(keys.device)

    def cut(whole: torch.Tensor) -> torch.Tensor:
        padded = torch.full((slots, kv_heads, room * BLOCK, dim), torch.nan).to(whole)
        padded[:, :, :length] = whole
        blocks = padded.view(slots, kv_heads, room, BLOCK, dim).transpose(1, 2)
        pages = torch.full((2 * slots * room, kv_heads, BLOCK, dim), torch.nan).to(whole)
        pages[order] = blocks.reshape(-1, kv_heads, BLOCK, dim)
        return pages

    return LayerPages(cut(keys), cut(values), order.view(slots, room).int())


def of_pages(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return what the slots of a table hold [slots, kv_heads, room · BLOCK, dim]."""
    return pages[table.long()].transpose(1, 2).flatten(2, 3)


def new_nan(x: torch.Tensor, *shape: int, **options: Any) -> torch.Tensor:
    """Stand for Tensor.new_empty: what nobody wrote is NaN."""
    new = torch.empty(shape, **({"dtype": x.dtype, "device": x.device} | options))
    return new.fill_(float("nan")) if new.is_floating_point() else new


def close(actual: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    """Compare with float64; `scale` is the size of the numbers that were added up."""
    relative, absolute = TOLERANCE[actual.dtype]
    assert_close(actual.double(), exact.double(), rtol=relative, atol=absolute * scale)


def numbers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
