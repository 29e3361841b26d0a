"""Steps and event loops take turns on a CPU: both want all cores."""

import asyncio
import time
from pathlib import Path

import pytest

from serving.engine import stream
from serving.engine.boundary import TokenDelta
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, base_of, request

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
