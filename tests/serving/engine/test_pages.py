"""Memory of the CPU: what is there before it is written, in how large pages, and who waits."""

import asyncio
import ctypes
import math
import mmap
import os
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch

from serving.engine import engine as engine_module
from serving.engine import kv_cache
from serving.engine import pages as pages_module
from serving.engine.build import assemble, read_model
from serving.engine.core import Event, Ticket, Warm
from serving.engine.engine import TorchEngine
from serving.engine.pages import (
    PAGE,
    LargePages,
    LaterPages,
    PagesAhead,
    QuietPages,
    SpareMemory,
    lazy_zeros,
)
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import (
    Folders,
    base_of,
    complete,
    request,
    wait_for_pages,
)

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=2, max_model_len=128)


def test_a_short_sequence_holds_the_memory_of_its_own_tokens_only() -> None:
    """Huge pages would give each of these slots to its first token: 64 MiB for 64 rows."""
    process = psutil.Process()
    shape = (64, 1, 8192, 64)  # 1 MiB a slot
    cache = lazy_zeros(shape, torch.bfloat16, torch.device("cpu"))
    before = process.memory_info().rss
    cache[:, :, 0] = 1
    assert process.memory_info().rss - before < 8 << 20
    assert cache[:, :, 1:].count_nonzero() == 0


def test_what_lies_in_large_pages_is_what_was_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors side by side, some that begin a new piece of memory, and one above a piece."""
    monkeypatch.setattr(LargePages, "CHUNK", 1 << 16)
    pages = LargePages()
    wanted = [torch.randn(size).bfloat16() for size in (1, 33, 1000, 30_000, 7, 20_000, 90_000, 5)]
    there = [pages.copy(tensor.view(-1, 1)) for tensor in wanted]
    assert all(torch.equal(a.view(-1), b) for a, b in zip(there, wanted, strict=True))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in there)


def _large_bytes() -> int:
    """Return how much of this process' memory lies in large pages, when no engine makes more."""
    wait_for_pages()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_pages_become_large_afterwards_and_hold_what_they_held() -> None:
    memory = lazy_zeros((5 * PAGE,), torch.uint8, torch.device("cpu"))
    pages, part = LaterPages(memory), memory[1000 : 3 * PAGE]
    part.copy_(torch.arange(len(part)) % 251)
    wanted, before = part.clone(), _large_bytes()
    pages.wrote(part)
    if not pages.waiting:
        pytest.skip("large pages are off here")
    pages.work()
    if _large_bytes() == before:
        assert not pages.waiting, "who cannot does not try again"
        pytest.skip("this Linux does not put pages together")
    while pages.waiting:
        pages.work()
    assert _large_bytes() - before in (2 * PAGE, 3 * PAGE), "whole ones"
    assert torch.equal(part, wanted)
    assert not memory[4 * PAGE :].any()
    pages.wrote(part)
    assert not pages.waiting, "once is enough"


class Piece(ctypes.Structure):
    """`struct iovec` of readv(2)."""

    _fields_: ClassVar = [("start", ctypes.c_void_p), ("size", ctypes.c_size_t)]


def test_a_page_that_the_system_is_busy_with_becomes_large_later() -> None:
    """A pipe holds a piece of it until it is read: madvise(2) says EAGAIN."""
    memory = lazy_zeros((3 * PAGE,), torch.uint8, torch.device("cpu"))
    pages = LaterPages(memory)
    whole = memory[-memory.data_ptr() % PAGE :].fill_(1)
    free, busy = whole[:PAGE], whole[PAGE : 2 * PAGE]
    before = _large_bytes()
    pages.wrote(free)
    while pages.waiting:
        pages.work()
    if _large_bytes() == before:
        pytest.skip("large pages are off here, or this Linux does not put pages together")
    pages.wrote(busy)
    read, write = os.pipe()
    try:
        held = Piece(busy.data_ptr(), mmap.PAGESIZE)
        assert ctypes.CDLL(None).vmsplice(write, ctypes.byref(held), 1, 0) == mmap.PAGESIZE
        pages.work()
        assert pages.waiting
        os.read(read, mmap.PAGESIZE)
        pages.work()
    finally:
        os.close(read)
        os.close(write)
    assert not pages.waiting
    assert _large_bytes() == before + 2 * PAGE
    assert busy.all()


def _pages_there(memory: torch.Tensor) -> float:
    """Return how much of it the system has given, in large pages: mincore(2)."""
    start = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    here = (ctypes.c_ubyte * -(-memory.nbytes // mmap.PAGESIZE))()
    size = ctypes.c_size_t(len(here) * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), size, here) == 0
    return sum(each & 1 for each in here) * mmap.PAGESIZE / PAGE


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagesAhead, "DELAY", 0.0)
    monkeypatch.setattr(PagesAhead, "PAUSE", 0.001)


def test_memory_is_ready_a_little_ahead_of_what_is_written(at_once: None) -> None:
    memory = lazy_zeros((40 * PAGE,), torch.uint8, torch.device("cpu"))
    pages = PagesAhead(memory, 5 * PAGE)
    deadline = time.monotonic() + 20
    while _pages_there(memory) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    if not _pages_there(memory):
        pytest.skip("this Linux does not make memory ready")
    for end in (7, 20, 38):
        part = memory[: end * PAGE]
        part.fill_(end)
        pages.wrote(part)
        while _pages_there(memory) < min(end + 4, 39) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert min(end + 4, 39) <= _pages_there(memory) <= min(end + 6, 40)
        assert bool((part == end).all())
    assert not memory[38 * PAGE :].any()


def test_memory_for_the_next_one_alike_is_ready_and_zero(at_once: None) -> None:
    spares, size = SpareMemory(), 4 * PAGE + 1000
    assert spares.take(size) is None, "nobody asked before"
    wait_for_pages()
    first = spares.take(size)
    assert first is not None
    assert len(first) == size
    there = _pages_there(first)  # before anybody reads it
    assert not first.any()
    first.fill_(7)
    wait_for_pages()
    second = spares.take(size)
    assert second is not None
    assert not second.any(), "not the same again"
    assert first.all(), "it is whose it is"
    if not there:
        pytest.skip("this Linux does not make memory ready")
    assert there > 4


def test_memory_is_made_ready_for_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come faster, as where adapters go in and out, do not each leave a thread."""
    monkeypatch.setattr(PagesAhead, "DELAY", 0.5)
    spares = SpareMemory()
    before = threading.active_count()
    assert [spares.take(PAGE) for _ in range(100)] == [None] * 100
    assert threading.active_count() <= before + 1
    wait_for_pages()
    assert spares.take(PAGE) is not None


def test_sizes_that_have_no_room_beside_each_other_do_not_leave_threads_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PagesAhead, "DELAY", 0.5)
    monkeypatch.setattr(SpareMemory, "MOST", 3 * PAGE)
    spares = SpareMemory()
    before = threading.active_count()
    for _ in range(50):
        assert spares.take(PAGE) is None
        assert spares.take(3 * PAGE) is None
    assert threading.active_count() <= before + 1
    wait_for_pages()
    assert spares.take(PAGE) is not None


def test_memory_that_lies_ready_is_bounded(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpareMemory, "MOST", 3 * PAGE)
    spares = SpareMemory()

    def take(pages: int) -> bool:
        wait_for_pages()
        return spares.take(pages * PAGE) is not None

    assert not any(map(take, (4, 1, 2)))
    assert not take(4), "more than lies ready for nobody"
    assert take(1)
    assert take(2)
    assert not take(3)
    assert not take(1), "the latest size has taken its room"


def test_memory_for_blocks_is_ready_in_quiet_as_far_as_is_wanted() -> None:
    piece = QuietPages.PIECE
    memory = lazy_zeros((10 * piece + 5000,), torch.uint8, torch.device("cpu"))
    pages = QuietPages(memory, 3 * piece)

    def work() -> float:
        while pages.waiting:
            pages.work()
        return _pages_there(memory) * PAGE / piece

    if not work():
        pytest.skip("this Linux does not make memory ready")
    assert _pages_there(memory) * PAGE == 3 * piece
    memory[: 5 * piece].fill_(5)
    pages.wrote(5 * piece)
    assert work() == 8
    pages.wrote(2 * piece)
    assert not pages.waiting, "what is written once more is there"
    pages.wrote(8 * piece)
    assert work() == pytest.approx(10 + 2 * mmap.PAGESIZE / piece), "to the end, and no further"
    assert bool((memory[: 5 * piece] == 5).all())
    assert not memory[5 * piece :].any()


def test_where_memory_cannot_be_made_ready_nobody_tries_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages_module, "POPULATE_WRITE", 12345)  # as an older Linux answers
    pages = QuietPages(lazy_zeros((4 * PAGE,), torch.uint8, torch.device("cpu")), PAGE)
    assert pages.waiting
    pages.work()
    pages.wrote(PAGE)
    assert not pages.waiting
    elsewhere = torch.empty(4 * PAGE, dtype=torch.uint8, device="meta")
    assert not QuietPages(elsewhere, PAGE).waiting


def test_memory_for_blocks_is_made_ready_while_nothing_runs_and_as_they_are_used(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuietPages, "PIECE", mmap.PAGESIZE)
    monkeypatch.setattr(kv_cache, "READY", 2 * mmap.PAGESIZE)
    pieces: list[QuietPages] = []
    work = QuietPages.work

    def counted(pages: QuietPages) -> None:
        pieces.append(pages)
        work(pages)

    monkeypatch.setattr(QuietPages, "work", counted)

    async def main() -> None:
        settings = replace(SETTINGS, prefix_cache_bytes=1 << 20)
        parts = assemble(read_model(base_of(tiny_base), settings), tiny_folders, settings)
        engine = TorchEngine(parts, settings)

        async def pieces_after(prompt: str) -> int:
            await complete(engine, request(prompt, max_tokens=1))
            async with asyncio.timeout(10):
                while parts.core.prefixes.pages.waiting:  # noqa: ASYNC110  # it tells nobody
                    await asyncio.sleep(0.01)
            return len(pieces)

        first = await pieces_after("x")
        assert first
        if first == 1:
            pytest.skip("this Linux does not make memory ready")
        assert first == 2
        assert await pieces_after("a prompt of several blocks, " * 3) > first
        await engine.aclose()

    asyncio.run(main())


class PagesThatWait:
    """Stands for `LaterPages`: a thousand of them, a millisecond each."""

    def __init__(self) -> None:
        self.left = 1000

    @property
    def waiting(self) -> bool:
        return self.left > 0

    def wrote(self, part: torch.Tensor) -> None:
        pass

    def work(self) -> None:
        self.left -= 1
        time.sleep(0.001)


def test_pages_are_made_large_while_nothing_runs_and_hold_nobody_up(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS)
        pages = PagesThatWait()
        parts.core.residency.stacks.large_pages = pages  # type: ignore[assignment]  # a stand-in
        engine = TorchEngine(parts, SETTINGS)
        wanted = request("x", tiny_folders.refs["a"], max_tokens=4)
        await complete(engine, wanted)
        while pages.left == 1000:  # noqa: ASYNC110  # it tells nobody when it begins
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            assert (await complete(engine, wanted)).finish == "length"
        assert pages.left > 0, "in the middle of them"
        while pages.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await engine.aclose()

    asyncio.run(main())


def test_pages_are_made_large_between_steps_but_not_while_a_prompt_is_read(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that always has something to do would read its adapters in small pages for ever."""
    monkeypatch.setattr(engine_module, "TIDYING_SHARE", math.inf)

    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS)
        core, pages = parts.core, PagesThatWait()
        parts.core.residency.stacks.large_pages = pages  # type: ignore[assignment]  # a stand-in
        seen: list[tuple[int, int]] = []  # tokens to read, pages left
        step = core.step

        def watched() -> list[Event]:
            events = step()
            if core.scheduler.running:  # while nothing runs it happens anyway
                seen.append((sum(s.unread for s in core.scheduler.running), pages.left))
            return events

        core.step = watched
        engine = TorchEngine(parts, SETTINGS)
        prompt = "a prompt that is read in several steps, " * 2
        await engine.warm(tiny_folders.refs["b"])
        first = asyncio.create_task(
            complete(engine, request("x", tiny_folders.refs["a"], max_tokens=120))
        )
        while not core.counters.generated_tokens:  # noqa: ASYNC110  # it tells nobody
            await asyncio.sleep(0)
        await complete(engine, request(prompt, tiny_folders.refs["b"], max_tokens=30))
        await first
        done = {bool(unread): 0 for unread, _ in seen}
        assert done.keys() == {True, False}
        for (unread, before), (_, after) in pairwise(seen):
            done[bool(unread)] += before - after
        await engine.aclose()
        assert done[False] > 0
        assert done[True] == 0, "steps after which somebody's prompt was still being read"

    asyncio.run(main())


def test_no_page_is_made_large_while_a_message_waits(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "TIDYING_SHARE", math.inf)

    async def left_after(*, asked: bool) -> int:
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS)
        core, pages = parts.core, PagesThatWait()
        core.residency.stacks.large_pages = pages  # type: ignore[assignment]  # a stand-in
        engine = TorchEngine(parts, SETTINGS)
        store, nobody = core.store_read, Warm(tiny_folders.refs["a"])
        heard: list[Ticket] = []

        def store_and_ask() -> None:
            store()
            if asked:
                engine._inbox.append((heard.append, nobody))

        core.store_read = store_and_ask
        await complete(engine, request("x", max_tokens=20))
        left = pages.left
        await engine.aclose()
        assert bool(heard) == asked
        return left

    assert asyncio.run(left_after(asked=False)) < 1000
    assert asyncio.run(left_after(asked=True)) == 1000
