"""What this machine can do: device, number format, memory."""

import ctypes
import errno
import logging
import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from serving.engine.boundary import EngineUnavailable
from serving.engine.settings import DeviceName, DtypeName

T = TypeVar("T")

logger = logging.getLogger(__name__)

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


# What a container sees of its own limit: control groups version 2, then version 1.
LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def total_memory(device: torch.device, limit_files: Sequence[Path] = LIMIT_FILES) -> int:
    """Return the bytes this process may use on the device: the container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = [file.read_text().strip() for file in limit_files if file.is_file()]
    return min([total, *(int(text) for text in texts if text != "max")])


def ridge_tokens(device: torch.device) -> int:
    """Return how many tokens are computed in the time that the weights take to be read once.

    Measured for a CPU (docs/benchmarks.md: 9 ms a step and 0.6 ms a token); arithmetic over
    bandwidth for a GPU (989 Tflop/s over 3.35 TB/s of an H100, of which about half is reached).
    """
    return 128 if device.type == "cuda" else 16


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


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros whose pages the operating system gives only when they are written.

    torch.zeros writes them all at once. numpy asks for huge pages, and then the few tokens of a
    short sequence hold the memory of a whole slot: 190 MB instead of 3 for SmolLM2-135M.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


class LargePages:
    """Memory for what every step reads and nothing changes, in pages of 2 MB where Linux has them.

    Weights are read faster than a processor looks up where each 4 KB of them are.
    """

    PAGE, CHUNK = 2 << 20, 64 << 20  # bytes

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same numbers there; it lives as long as it is referred to."""
        taken = -(-tensor.nbytes // 64) * 64  # a line of the cache begins with each tensor
        if taken > len(self._free):
            self._free = self._pages(max(taken, self.CHUNK))
        own, self._free = self._free[: tensor.nbytes], self._free[taken:]
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _pages(self, size: int) -> torch.Tensor:
        pages = mmap.mmap(-1, size + self.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a Linux that was built without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(pages, dtype=torch.uint8)
        return whole[-whole.data_ptr() % self.PAGE :]


class LaterPages:
    """Pages of 2 MB for memory that is written bit by bit, as an arena of adapters.

    A large page is zeroed when its first number is written, and whoever writes waits for that. So
    memory is written in pages of 4 KB, and what lies there is put together when there is time:
    madvise(2) with MADV_COLLAPSE, since Linux 6.1. Elsewhere it stays as it is.
    """

    PAGE, COLLAPSE = 2 << 20, 25  # bytes; from <linux/mman.h>
    PATIENCE = 1000  # times that the system may be busy with a page
    SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

    def __init__(self, memory: torch.Tensor) -> None:
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        self._whole = range(-(-start // self.PAGE), end // self.PAGE)  # numbers of pages
        self._waiting: set[int] = set()
        self._large: set[int] = set()
        self._system = ctypes.CDLL(None, use_errno=True)
        self._patience = self.PATIENCE
        self._can = memory.device.type == "cpu" and self._wanted()

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def wrote(self, part: torch.Tensor) -> None:
        """Note what will be read often from now on."""
        start, end = part.data_ptr(), part.data_ptr() + part.nbytes
        pages = range(start // self.PAGE, -(-end // self.PAGE)) if self._can else ()
        self._waiting.update(p for p in pages if p in self._whole and p not in self._large)

    def enlarge(self) -> None:
        """Make one of those that wait large. It takes 7 ms, in which whoever reads it waits."""
        page = self._waiting.pop()
        where, size = ctypes.c_void_p(page * self.PAGE), ctypes.c_size_t(self.PAGE)
        if self._system.madvise(where, size, self.COLLAPSE) == 0:
            self._large.add(page)
        elif ctypes.get_errno() == errno.EAGAIN and self._patience:  # it is busy with it
            self._patience -= 1
            self._waiting.add(page)
        else:  # an older Linux, or there is no piece of 2 MB left
            logger.info("adapters stay in pages of 4 KB: this Linux gives no larger ones now")
            self._can = False
            self._waiting.clear()

    def _wanted(self) -> bool:
        return self.SETTING.is_file() and "[never]" not in self.SETTING.read_text()
