"""Steps and event loops take turns on a CPU: both want all cores."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine import engine as engine_module
from serving.engine import stream
from serving.engine.boundary import TokenDelta
from serving.engine.build import assemble, read_model
from serving.engine.core import Event
from serving.engine.engine import TorchEngine
from serving.engine.sampler import Sampler
from serving.engine.sequence import Sequence as Running
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, Result, base_of, complete, request, until

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=2, max_model_len=128)
COUNT = 6


def test_a_step_waits_until_the_tokens_of_the_last_one_are_written(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a task that the reader wakes in its turn, as where an answer has several choices."""
    monkeypatch.setattr(stream, "TURN_SECONDS", 60.0)
    steps: list[int] = []

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, SETTINGS)
        read: asyncio.Queue[TokenDelta] = asyncio.Queue()

        async def write() -> None:
            for _ in range(COUNT):
                await read.get()
                time.sleep(0.02)  # noqa: ASYNC251  # a step that did not wait would be over by then
                steps.append((await engine.stats()).steps)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            async for delta in engine.generate(request("hello", max_tokens=COUNT)):
                read.put_nowait(delta)
        await engine.aclose()

    asyncio.run(main())
    assert steps == list(range(1, COUNT + 1))


def test_what_a_step_read_is_kept_while_its_tokens_are_written(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a token does not wait for copies into the prefix cache."""
    read, came_first = threading.Event(), list[bool]()

    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS)
        store = parts.core.prefixes.store

        def slowly(sequence: Running) -> None:
            if not came_first:
                came_first.append(read.wait(10))
            store(sequence)

        monkeypatch.setattr(parts.core.prefixes, "store", slowly)
        engine = TorchEngine(parts, SETTINGS)
        async for _ in engine.generate(request("a text of more than one block", max_tokens=2)):
            read.set()
        assert (await engine.stats()).prefix_bytes
        await engine.aclose()

    asyncio.run(main())
    assert came_first == [True]


def test_a_loop_that_does_not_come_to_write_holds_up_no_steps(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "TURN_SECONDS", 0.001)

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, SETTINGS)
        deadline = time.monotonic() + 60
        async for _ in engine.generate(request("hello", max_tokens=COUNT)):
            while (await engine.stats()).steps < COUNT:  # the loop does nothing else meanwhile
                assert time.monotonic() < deadline, "the steps wait for the loop"
        await engine.aclose()

    asyncio.run(main())


def test_who_loaded_an_adapter_is_answered_before_the_others_have_their_tokens(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the answer goes through some tasks, as that of a load call does."""
    monkeypatch.setattr(stream, "TURN_SECONDS", 60.0)
    tokens: list[int] = []
    answered: list[tuple[int, int]] = []

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, SETTINGS)

        async def keep(tasks: int) -> None:
            if not tasks:
                return await engine.keep(tiny_folders.refs["a"])
            return await asyncio.create_task(keep(tasks - 1))

        async def load() -> None:
            await keep(tasks=2)
            answered.append(((await engine.stats()).steps, len(tokens)))

        loading = None
        async for delta in engine.generate(request("hello", max_tokens=40)):
            tokens.extend(delta.token_ids)
            if loading is None:
                loading = asyncio.create_task(load())
        assert loading is not None
        await loading
        await engine.aclose()

    asyncio.run(main())
    (steps, written), *_ = answered
    assert 1 < steps < 40, "it was loaded beside the stream"
    assert written == steps - 1, "the token of the step that the adapter was kept in comes after"


def test_what_a_step_gave_is_told_when_a_load_is_done_that_began_beside_it(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is in the gap that ends with that step; the one behind it has the self-check."""
    monkeypatch.setattr(engine_module, "LOADING_SECONDS", 60.0)
    monkeypatch.setattr(engine_module, "TELLING_SECONDS", 60.0)
    begun, allowed = threading.Event(), threading.Event()

    def fetch(ref: AdapterRef) -> Path:
        begun.set()
        assert allowed.wait(30)
        return tiny_folders(ref)

    async def main() -> None:
        loop, ref = asyncio.get_running_loop(), tiny_folders.refs["a"]
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), fetch, SETTINGS)
        sampler = parts.core.sampler

        class Asking(Sampler):
            def choose(self, logits: torch.Tensor, sequences: Sequence[Running]) -> Any:
                if parts.core.counters.steps == 1:  # the second one
                    asyncio.run_coroutine_threadsafe(engine.keep(ref), loop)
                    assert begun.wait(30)
                return super().choose(logits, sequences)

        parts.core.sampler = Asking(sampler.greedy, frozenset(sampler.eos_ids))
        engine = TorchEngine(parts, SETTINGS)
        tokens: list[int] = []

        async def read() -> None:
            async for delta in engine.generate(request("hello", max_tokens=COUNT)):
                tokens.extend(delta.token_ids)

        reading = asyncio.create_task(read())
        await until(engine, lambda stats: stats.steps == 2)
        await asyncio.sleep(0.1)  # more than a token takes that is told at once
        assert len(tokens) == 1
        allowed.set()
        async with asyncio.timeout(30):  # the end of the load ends the wait
            await reading
        assert len(tokens) == COUNT
        await engine.aclose()

    asyncio.run(main())


def test_what_comes_beside_a_pass_that_found_nothing_to_do_gets_a_step(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """It is taken in right behind that pass; the engine must not go to sleep on it."""
    allowed = threading.Event()

    def fetch(ref: AdapterRef) -> Path:
        assert allowed.wait(60)
        return tiny_folders(ref)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), fetch, SETTINGS)
        passes, asked = parts.core.step, list[Future[Result]]()

        def step() -> list[Event]:
            events = passes()
            if not asked:
                later = complete(engine, request("hello", max_tokens=1))
                asked.append(asyncio.run_coroutine_threadsafe(later, loop))
                asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(10)
            return events

        parts.core.step = step
        engine = TorchEngine(parts, SETTINGS)
        async with asyncio.timeout(30):
            warming = asyncio.create_task(engine.warm(tiny_folders.refs["a"]))
            while not asked:  # noqa: ASYNC110  # an engine tells nobody
                await asyncio.sleep(0.001)
            assert len((await asyncio.wrap_future(asked[0])).tokens) == 1
            assert not warming.done()
            allowed.set()
            await warming
        await engine.aclose()

    asyncio.run(main())
