"""Memory of the CPU: when the system gives it, and in how large pages."""

import ctypes
import errno
import logging
import math
import mmap
import platform
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

PAGE = 2 << 20  # bytes of a large one
# From <linux/mman.h>; mmap has no names for them.
COLLAPSE, POPULATE_WRITE = 25, 23
NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0


def lazy_zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, scattered: bool = False
) -> torch.Tensor:
    """Return zeros whose pages the operating system gives only when they are written.

    torch.zeros writes them all at once. numpy asks for huge pages, and then the few tokens of a
    short sequence hold the memory of a whole slot: 190 MB instead of 3 for SmolLM2-135M. So are
    `scattered` ones kept from them where the system gives such to everybody. There may be more of
    them than memory, if somebody counts what is written. Raises OSError where there may not.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (NORESERVE if scattered else 0)
    zeros = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(*shape)
    if scattered and hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(zeros.data_ptr(), size, mmap.MADV_NOHUGEPAGE)
    return zeros


def give_back(zeros: torch.Tensor) -> None:
    """Let the system have whole pages of what `lazy_zeros` made: they are zero again."""
    if zeros.device.type == "cpu":
        start = -(-zeros.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (zeros.data_ptr() + zeros.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            _advise(start, size, mmap.MADV_DONTNEED)


class LargePages:
    """Memory for what every step reads and nothing changes, in pages of 2 MB where Linux has them.

    Weights are read faster than a processor looks up where each 4 KB of them are.
    """

    CHUNK = 64 << 20  # bytes

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
        pages = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a Linux that was built without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        return _aligned(torch.frombuffer(pages, dtype=torch.uint8))


class LaterPages:
    """Pages of 2 MB for memory that is written bit by bit, as an arena of adapters.

    A large page is zeroed when its first number is written, and whoever writes waits for that. So
    what was written in pages of 4 KB is put together later, when nothing runs or between two steps:
    madvise(2) with MADV_COLLAPSE, since Linux 6.1. Elsewhere it stays as it is.
    """

    PATIENCE = 1000  # times that the system may be busy with a page
    SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

    def __init__(self, memory: torch.Tensor) -> None:
        self._whole = _whole_pages(memory)
        self._waiting: set[int] = set()
        self._large: set[int] = set()
        self._patience = self.PATIENCE
        self._can = memory.device.type == "cpu" and self._wanted()

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def wrote(self, part: torch.Tensor) -> None:
        """Note what will be read often from now on."""
        start, end = part.data_ptr(), part.data_ptr() + part.nbytes
        pages = range(start // PAGE, -(-end // PAGE)) if self._can else ()
        self._waiting.update(p for p in pages if p in self._whole and p not in self._large)

    def work(self) -> None:
        """Make one of those that wait large. It takes 5 to 7 ms; whoever reads it waits."""
        page = self._waiting.pop()
        fault = _advise(page * PAGE, PAGE, COLLAPSE)
        if fault == 0:
            self._large.add(page)
        elif fault == errno.EAGAIN and self._patience:  # it is busy with it
            self._patience -= 1
            self._waiting.add(page)
        else:  # an older Linux, or there is no piece of 2 MB left
            logger.info("adapters stay in pages of 4 KB: this Linux gives no larger ones now")
            self._can = False
            self._waiting.clear()

    def _wanted(self) -> bool:
        return self.SETTING.is_file() and "[never]" not in self.SETTING.read_text()


class PagesAhead:
    """Memory that is written from its beginning on, made ready a little ahead of that.

    Who writes the first number of a page waits until the system has found and zeroed it, and on a
    virtual machine perhaps until its host has: 1.5 to 15 µs for 4 KB. So a thread has that done, in
    large pages if there are any: madvise(2) with MADV_POPULATE_WRITE, since Linux 5.14. Elsewhere
    nothing is ready, and nothing else is different.
    """

    # Seconds before the first page and after each: a step that runs meanwhile is longer by one page
    # (0.3 to 8 ms) at most, and not one of those that read the first prompt of what was written.
    DELAY, PAUSE = 0.5, 0.1

    def __init__(self, memory: torch.Tensor, ahead: int) -> None:
        """Keep `ahead` bytes ready behind the last one that was written."""
        self._memory, self._ahead = memory, ahead  # it has to be there as long as the thread is
        can = memory.device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")
        self._whole = _whole_pages(memory) if can else range(0)
        self._lock = threading.Lock()
        self._ready = self._wanted = self._whole.start  # the first page that is not
        self._running = False
        self._want(memory.data_ptr())

    def wrote(self, part: torch.Tensor) -> None:
        self._want(part.data_ptr() + part.nbytes)

    @property
    def ready(self) -> bool:
        """Tell whether nothing is left to be made ready."""
        with self._lock:
            return not self._running

    def _want(self, end: int) -> None:
        with self._lock:
            self._ready = max(self._ready, min(end // PAGE, self._whole.stop))
            ahead = min(-(-(end + self._ahead) // PAGE), self._whole.stop)
            self._wanted = max(self._wanted, ahead)
            if self._running or self._ready >= self._wanted:
                return
            self._running = True
        threading.Thread(target=self._prepare, name="pages-ahead", daemon=True).start()

    def _prepare(self) -> None:
        time.sleep(self.DELAY)
        while (page := self._next()) is not None:
            start = page * PAGE
            _advise(start, PAGE, mmap.MADV_HUGEPAGE)  # or small ones, where Linux has none
            _advise(start, PAGE, POPULATE_WRITE)  # where it fails, who writes waits, as everywhere
            time.sleep(self.PAUSE)

    def _next(self) -> int | None:
        with self._lock:
            page, self._running = self._ready, self._ready < self._wanted
            if not self._running:
                return None
            self._ready += 1
            return page


class QuietPages:
    """Like `PagesAhead` for memory that is written all the time: only when nothing else is to do.

    Large pages are not asked for: a request that came meanwhile would wait until one is found.
    """

    PIECE = 1 << 20  # bytes at once: 1.5 to 4 ms on a virtual machine, which a request may wait

    def __init__(self, memory: torch.Tensor, ahead: int) -> None:
        """Keep `ahead` bytes ready behind the last one that was written."""
        self._memory, self._ahead = memory, ahead
        self._size = memory.nbytes if memory.device.type == "cpu" else 0
        self._ready, self._wanted = 0, min(ahead, self._size)

    @property
    def waiting(self) -> bool:
        return self._ready < self._wanted

    def wrote(self, end: int) -> None:
        """Note that bytes up to this one have been written."""
        self._ready = max(self._ready, end // self.PIECE * self.PIECE)
        self._wanted = max(self._wanted, min(end + self._ahead, self._size))

    def work(self) -> None:
        """Make one piece ready."""
        size = min(self.PIECE, self._size - self._ready)
        if _advise(self._memory.data_ptr() + self._ready, size, POPULATE_WRITE):
            self._size = self._wanted = 0  # this Linux cannot
        self._ready += size


class SpareMemory:
    """Zeros for the next one of things that are alike, as adapters of one rank are.

    Memory that nobody has written yet costs whoever writes it first as much as a good part of
    reading an adapter (see `PagesAhead`). So the next piece is made ready as soon as one is taken.
    """

    LEAST = PAGE  # bytes of a piece; below that there is nothing to gain
    MOST = 64 << 20  # bytes that lie ready for nobody yet

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spares: OrderedDict[int, _Spare] = OrderedDict()  # by bytes, the latest one last

    def take(self, size: int) -> torch.Tensor | None:
        """Return `size` bytes for good if they lie ready; else they do some time later."""
        if not self.LEAST <= size <= self.MOST:
            return None
        with self._lock:
            spare = self._spares.get(size)
            if spare is not None and not spare.pages.ready:
                return None
            self._spares.pop(size, None)
            self._make_room(size)
            if sum(self._spares) + size <= self.MOST:
                self._spares[size] = _Spare.begin(size)
        return spare and spare.memory

    def _make_room(self, size: int) -> None:
        """Give up what was asked for longest ago; what a thread still works on is not given up."""
        for old, spare in list(self._spares.items()):
            if sum(self._spares) + size > self.MOST and spare.pages.ready:
                del self._spares[old]


@dataclass(frozen=True, slots=True)
class _Spare:
    memory: torch.Tensor
    pages: PagesAhead

    @classmethod
    def begin(cls, size: int) -> "_Spare":
        whole = -(-size // PAGE) * PAGE
        memory = lazy_zeros((whole + PAGE,), torch.uint8, torch.device("cpu"))
        pages = _aligned(memory)[:whole]
        return cls(pages[:size], PagesAhead(pages, whole))


def _aligned(memory: torch.Tensor) -> torch.Tensor:
    """Return it from the beginning of its first large page on."""
    return memory[-memory.data_ptr() % PAGE :]


def _whole_pages(memory: torch.Tensor) -> range:
    """Return the numbers of the large pages that lie in it: an address over PAGE."""
    start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    return range(-(-start // PAGE), end // PAGE)


def _advise(start: int, size: int, advice: int) -> int:
    """Call madvise(2) for memory that begins with a page; return the error number, or 0."""
    system = ctypes.CDLL(None, use_errno=True)
    failed = system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return ctypes.get_errno() if failed else 0
