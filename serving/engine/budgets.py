"""What may take how much of a computer's memory, decided before anything is read.

Without a GPU all is in one memory: the weights, and what grows while the engine works. The system
gives that page by page as it is first written, so a byte that was promised twice is missed only
hours later, and then the kernel ends the process.
"""

from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from registry.base import BaseModel
from registry.tensors import read_folder, tensor_files
from serving.engine.boundary import EngineUnavailable
from serving.engine.hardware import choose_device, choose_dtype, total_memory
from serving.engine.settings import EngineSettings, option
from serving.engine.spec import check_architecture
from serving.engine.weights import stored_dtype

# Of what nobody has asked for. On its way an adapter takes its file and what it is converted to.
# What is not on its way leaves that part to the system, for files.
SHARES = {"kv_cache_bytes": 2, "prefix_cache_bytes": 8, "adapter_memory": 8, "loading_memory": 4}
BUDGETS = (*SHARES, "adapter_host_memory")

# The interpreter, torch, the server, and what a step computes with: 0.4 to 0.6 GiB were measured
# with SmolLM2-135M and 32 requests at once.
PROCESS = 640 << 20


def within_memory(base: BaseModel, settings: EngineSettings) -> EngineSettings:
    """Settle what is left open before the weights are read, so that all fits a CPU's memory.

    Of a GPU's, it settles the bytes of keys and values.

    Raises EngineUnavailable where it cannot fit, or nothing here computes the base at all.
    """
    check_architecture(base.path)
    device = choose_device(settings.device)
    if device.type != "cpu":
        if settings.kv_cache_bytes is not None:
            return settings
        left = total_memory(device) - sum(file.stat().st_size for file in tensor_files(base.path))
        return replace(settings, kv_cache_bytes=max(1, left // SHARES["kv_cache_bytes"]))
    dtype = choose_dtype(settings.dtype, device, stored_dtype(base.path))
    return divide(settings, total_memory(device), weight_bytes(base.path, dtype))


def divide(settings: EngineSettings, total: int, weights: int) -> EngineSettings:
    """Return settings whose budgets take `total` bytes at most, with the weights and PROCESS.

    Raises EngineUnavailable for those that were given and do not fit.
    """
    given = {name: size for name in BUDGETS if (size := getattr(settings, name)) is not None}
    left = total - weights - PROCESS - sum(given.values())
    if left < 0:
        raise EngineUnavailable(_too_much(settings, total, weights))
    open_ones = {name: part for name, part in SHARES.items() if name not in given}
    shares = {name: max(1, left // part) for name, part in open_ones.items()}
    return replace(settings, **shares, shares=settings.shares | shares.keys())


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return what the weights take: each once, and the largest tensor up to twice more.

    It is packed, and copied to large pages, beside where it is read to; where torch computes a tied
    embedding stays beside its packed head.
    """
    sizes = [prod(tensor.shape) * dtype.itemsize for tensor in read_folder(folder).values()]
    return sum(sizes) + 2 * max(sizes)


def _too_much(settings: EngineSettings, total: int, weights: int) -> str:
    """Say what was asked for; shares that were settled before are nobody's to lower."""
    sizes = {name: getattr(settings, name) for name in BUDGETS if settings.is_given(name)}
    asked = [f"{option(name)}={size}" for name, size in sizes.items() if size]
    lower = "Lower these, or take" if asked else "Take"
    return (
        f"The {total} bytes of this machine, or of its container, do not hold together: "
        f"{', '.join((f'weights={weights}', f'process={PROCESS}', *asked))}. {lower} a smaller "
        "base or more memory."
    )
