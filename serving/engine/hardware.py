"""What this machine can do: device, number format, memory."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from serving.engine.boundary import EngineUnavailable
from serving.engine.settings import DeviceName, DtypeName

T = TypeVar("T")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: DeviceName) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailable("device='cuda', but torch finds no CUDA device. Use 'cpu'.")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda")
    return torch.device("cpu")


def choose_dtype(name: DtypeName, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Pick the number format; `stored` is the one the base's files have."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def limit_files(
    groups: Path = Path("/proc/self/cgroup"), top: Path = Path("/sys/fs/cgroup")
) -> list[Path]:
    """Return where limits of this process may stand: of its control groups, and those around.

    cgroups(7): `0::/system.slice/x` is version 2, `4:memory:/x` is version 1. A container sees its
    own limit at the top, whatever path its host has told it.
    """
    files: list[Path] = []
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for kinds, path in (line.split(":", 2)[1:] for line in lines):
        if "memory" in kinds.split(","):
            root, name = top / "memory", "memory.limit_in_bytes"
        elif not kinds:
            root, name = top, "memory.max"
        else:
            continue
        own = root / path.lstrip("/")
        files += [each / name for each in (own, *own.parents) if each.is_relative_to(root)]
    return files


def total_memory(device: torch.device, limits: Sequence[Path] | None = None) -> int:
    """Return the bytes this process may use on the device: the container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = limit_files() if limits is None else limits
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return min([total, *(int(text) for text in texts if text != "max")])


def ridge_tokens(device: torch.device, matrices: bool = False) -> int:
    """Return how many tokens are computed in the time that the weights take to be read once.

    Measured for a CPU (docs/tuning.md: 9 ms a step and 0.6 ms a token), and for one that
    multiplies `matrices` what it is while its host is busy; arithmetic over bandwidth for a GPU
    (989 Tflop/s over 3.35 TB/s of an H100, of which about half is reached).
    """
    if device.type == "cuda":
        return 128
    return 32 if matrices else 16


def compute_alone() -> None:
    """Keep what torch computes on the calling thread on it, from now on.

    OpenMP gives each thread that computes a team of its own, for as long as it lives. Beside
    another team those of the step would wait for each other in the kernel instead of in a loop.
    """
    everybody = torch.get_num_threads()
    torch.set_num_threads(1)
    # That is also what later threads begin with. A thread that ends at once puts it right.
    restoring = threading.Thread(target=torch.set_num_threads, args=(everybody,))
    restoring.start()
    restoring.join()


def elsewhere(compute: Callable[[], T]) -> T:
    """Return what `compute` gives, which runs on a thread that ends then, and its team with it.

    A team of OpenMP's lives as long as the thread it was made for. While there are more threads in
    teams than cores, those that wait for each other in a step sleep after a microsecond, and are
    woken by the kernel some hundred times a step: 5 % of the tokens.
    """
    computed: Future[T] = Future()

    def run() -> None:
        try:
            computed.set_result(compute())
        except BaseException as error:
            computed.set_exception(error)

    threading.Thread(target=run, name="engine-read", daemon=True).start()
    return computed.result()
