"""The engine contract: what every engine behind the boundary does."""

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from registry.adapter import AdapterRef
from serving.engine.boundary import (
    AdapterLoadFailed,
    Engine,
    EngineBusy,
    EngineUnavailable,
    RequestRefused,
)
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import (
    Folders,
    base_of,
    complete,
    complete_all,
    request,
    stream,
    until,
)
from tests.serving.scripted import ScriptedEngine

MAX_LEN = 256


@dataclass(frozen=True)
class Bench:
    """An engine for two sequences and one that waits, and adapters to ask it for."""

    engine: Engine
    good: AdapterRef
    other: AdapterRef
    broken: AdapterRef


def torch_bench(base: Path, folders: Folders) -> Bench:
    settings = EngineSettings(
        device="cpu", dtype="float32", max_running=2, max_waiting=1, max_model_len=MAX_LEN
    )
    refs = folders.refs
    engine = TorchEngine.create(base_of(base), folders, settings)
    return Bench(engine, refs["a"], refs["b"], refs["missing"])


def scripted_bench(base: Path, folders: Folders) -> Bench:
    refs = folders.refs
    engine = ScriptedEngine(
        max_running=2,
        max_waiting=1,
        max_model_len=MAX_LEN,
        step_seconds=0.001,
        unloadable={refs["missing"].digest},
    )
    return Bench(engine, refs["a"], refs["b"], refs["missing"])


Body = Callable[[Bench], Coroutine[Any, Any, None]]
Play = Callable[[Body], None]


@pytest.fixture(params=[torch_bench, scripted_bench], ids=["torch", "scripted"])
def play(request: pytest.FixtureRequest, tiny_base: Path, tiny_folders: Folders) -> Play:
    """Run a body against a fresh engine, in one event loop, and close the engine."""

    def run(body: Body) -> None:
        async def main() -> None:
            bench = request.param(tiny_base, tiny_folders)
            try:
                async with asyncio.timeout(30):
                    await body(bench)
            finally:
                await bench.engine.aclose()

        asyncio.run(main())

    return run


def test_an_answer_has_max_tokens_and_says_so_last(play: Play) -> None:
    async def body(bench: Bench) -> None:
        deltas = [d async for d in bench.engine.generate(request("hello", max_tokens=7))]
        assert sum(len(d.token_ids) for d in deltas) == 7
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "length"
        assert deltas[-1].completion_tokens == 7

    play(body)


def test_adapters_and_the_base_answer_differently_side_by_side(play: Play) -> None:
    async def body(bench: Bench) -> None:
        wanted = [request("hi", ref, max_tokens=12) for ref in (bench.good, bench.other, None)]
        alone = [await complete(bench.engine, each) for each in wanted]
        together = await complete_all(bench.engine, wanted)
        assert alone == together
        assert len({tuple(result.tokens) for result in alone}) == 3

    play(body)


def test_logprobs_come_with_every_token_only_when_asked_for(play: Play) -> None:
    async def body(bench: Bench) -> None:
        with_them = await complete(bench.engine, request("x", max_tokens=5, logprobs=3))
        assert [entry.token_id for entry in with_them.logprobs] == with_them.tokens
        for entry in with_them.logprobs:
            values = [value for _, value in entry.top]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert all(value <= 0 and math.isfinite(value) for value in values)
        only_chosen = await complete(bench.engine, request("x", max_tokens=2, logprobs=0))
        assert [entry.top for entry in only_chosen.logprobs] == [(), ()]
        assert not (await complete(bench.engine, request("x", max_tokens=2))).logprobs

    play(body)


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(play: Play) -> None:
    async def body(bench: Bench) -> None:
        def wanted(seed: int) -> Coroutine[Any, Any, Any]:
            ask = request("seed", bench.good, max_tokens=16, temperature=1.0, seed=seed)
            return complete(bench.engine, ask)

        assert await wanted(1) == await wanted(1)
        assert (await wanted(1)).tokens != (await wanted(2)).tokens

    play(body)


def test_nothing_is_queued_before_the_first_step_of_the_iterator(play: Play) -> None:
    async def body(bench: Bench) -> None:
        iterators = [stream(bench.engine, request("x")) for _ in range(50)]
        assert (await bench.engine.stats()).waiting == 0
        assert all(inspect.isasyncgen(iterator) for iterator in iterators)
        await complete(bench.engine, request("x"))

    play(body)


def test_closing_the_iterator_frees_the_place_at_once(play: Play) -> None:
    async def body(bench: Bench) -> None:
        for _ in range(10):
            deltas = stream(bench.engine, request("x", bench.good, max_tokens=200))
            await anext(deltas)
            await deltas.aclose()
        stats = await until(bench.engine, lambda stats: not stats.running)
        assert stats.aborted == 10
        assert all(resident.running == 0 for resident in stats.resident)

    play(body)


def test_cancelling_the_reader_aborts_the_request(play: Play) -> None:
    async def body(bench: Bench) -> None:
        task = asyncio.create_task(complete(bench.engine, request("x", max_tokens=200)))
        await until(bench.engine, lambda stats: stats.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await until(bench.engine, lambda stats: not stats.running)
        assert stats.aborted == 1

    play(body)


def test_a_full_queue_is_busy_and_says_when_to_come_back(play: Play) -> None:
    async def body(bench: Bench) -> None:
        held = [stream(bench.engine, request("x", max_tokens=200)) for _ in range(2)]
        for deltas in held:
            await anext(deltas)
        third = asyncio.create_task(complete(bench.engine, request("x", max_tokens=1)))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy) as busy:
            await complete(bench.engine, request("x"))
        assert busy.value.retry_after >= 1
        with pytest.raises(EngineBusy, match=re.escape(str(busy.value))):
            bench.engine.check_room("")
        for deltas in held:
            await deltas.aclose()
        assert (await third).finish == "length"
        bench.engine.check_room("")

    play(body)


def test_too_long_a_request_is_refused_with_both_numbers(play: Play) -> None:
    async def body(bench: Bench) -> None:
        assert bench.engine.max_model_len == MAX_LEN
        with pytest.raises(RequestRefused, match=str(MAX_LEN)):
            await complete(bench.engine, request([1] * 250, max_tokens=7))
        assert len((await complete(bench.engine, request([1] * 250, max_tokens=6))).tokens) == 6

    play(body)


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_and_no_other(play: Play) -> None:
    async def body(bench: Bench) -> None:
        results = await complete_all(
            bench.engine, [request("x", bench.broken), request("x", bench.good)]
        )
        assert isinstance(results[0], AdapterLoadFailed)
        assert bench.broken.label in str(results[0])
        assert not isinstance(results[1], BaseException)
        with pytest.raises(AdapterLoadFailed):
            await bench.engine.warm(bench.broken)

    play(body)


def test_warming_makes_an_adapter_resident_and_is_idempotent(play: Play) -> None:
    async def body(bench: Bench) -> None:
        await asyncio.gather(*(bench.engine.warm(bench.good) for _ in range(3)))
        await bench.engine.warm(bench.good)
        stats = await bench.engine.stats()
        assert [resident.digest for resident in stats.resident] == [bench.good.digest]
        await bench.engine.check_health()

    play(body)


def test_a_closed_engine_takes_nothing_and_ends_what_runs(play: Play) -> None:
    async def body(bench: Bench) -> None:
        task = asyncio.create_task(complete(bench.engine, request("x", max_tokens=200)))
        await until(bench.engine, lambda stats: stats.running == 1)
        await bench.engine.aclose()
        await bench.engine.aclose()
        with pytest.raises(EngineUnavailable):
            await task
        with pytest.raises(EngineUnavailable):
            await complete(bench.engine, request("x"))
        with pytest.raises(EngineUnavailable):
            await bench.engine.check_health()

    play(body)
