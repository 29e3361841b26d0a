"""One bad request, adapter or step: who fails, and who goes on unchanged."""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from registry.adapter import AdapterRef, Version
from registry.errors import IntegrityError
from registry.materialize import FoundFiles, StoredFiles
from registry.store import Registry
from serving.engine.batch import Batch
from serving.engine.boundary import (
    AdapterFiles,
    AdapterLoadFailed,
    EngineUnavailable,
    RequestFailed,
    RequestRefused,
)
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.kv_cache import KVCache
from serving.engine.loader import AdapterLoader
from serving.engine.lora import HostAdapter, LoraStacks
from serving.engine.model_runner import Forward
from serving.engine.sequence import Sequence
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import (
    Folders,
    Result,
    base_of,
    complete,
    complete_all,
    request,
    run_all,
    until,
    wait_for_pages,
)
from tests.serving.live import Wardrobe

POISON = (1, 2, 13)
SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_running=8, max_model_len=128, max_lora_rank=32
)


class Poisoned:
    """A model, but a batch that reads the poison cannot be computed."""

    def __init__(self, model: Forward, error: type[BaseException]) -> None:
        self.model, self.error = model, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        logits = self.model.forward(batch, cache, stacks)
        ids = batch.ids.tolist()
        if POISON in zip(ids, ids[1:], ids[2:], strict=False):
            raise self.error("poison")
        return logits


def poisoned(
    base: Path, folders: Folders, error: type[BaseException] = RuntimeError
) -> TorchEngine:
    bad = cast("Forward", Poisoned(read_model(base_of(base), SETTINGS), error))
    return TorchEngine(assemble(bad, folders, SETTINGS), SETTINGS)


def healthy(base: Path, fetch: Callable[[AdapterRef], Path]) -> TorchEngine:
    return TorchEngine.create(base_of(base), fetch, SETTINGS)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_a_request_that_breaks_the_step_fails_alone(
    tiny_base: Path, tiny_folders: Folders, error: type[BaseException]
) -> None:
    refs = [*(tiny_folders.refs[name] for name in "abc"), None]
    good = [
        request([20 + i, 40 + i, 60 + i], ref, max_tokens=10, temperature=t, seed=i)
        for i, (ref, t) in enumerate((ref, t) for ref in refs for t in (0.0, 1.0))
        if i != 2
    ]
    bad = request([7, *POISON], tiny_folders.refs["a"], max_tokens=10)
    alone = run_all(healthy(tiny_base, tiny_folders), good)

    async def main() -> list[Result | BaseException]:
        engine = poisoned(tiny_base, tiny_folders, error)
        results = await complete_all(engine, [*good[:4], bad, *good[4:]])
        await engine.check_health()
        stats = await engine.stats()
        assert (stats.failed, stats.running) == (1, 0)
        assert all(resident.running == 0 for resident in stats.resident)
        await engine.aclose()
        return results

    results = asyncio.run(main())
    failure = results.pop(4)
    assert isinstance(failure, RequestFailed)
    assert bad.request_id in str(failure)
    assert results == alone


def test_logits_that_are_not_finite_fail_that_row_and_leave_no_trace(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """The adapter's weights are finite and overflow in the forward pass; its KV slot is reused."""
    good = [request([i, i + 1], tiny_folders.refs["a"], max_tokens=8) for i in range(7)]
    alone = run_all(healthy(tiny_base, tiny_folders), good)

    async def main() -> None:
        engine = healthy(tiny_base, tiny_folders)
        for _ in range(3):
            huge = request([5] * 20, tiny_folders.refs["huge"], max_tokens=8)
            results = await complete_all(engine, [huge, *good])
            assert isinstance(results[0], RequestFailed)
            assert "finite" in str(results[0])
            assert results[1:] == alone
        await engine.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wide", ("40", "32")),  # its rank and the engine's highest
        ("nan", ("finite",)),
        ("deep", ("layers.2.", "linear layer")),
        ("missing", ("adapter_config.json",)),
    ],
)
def test_an_adapter_that_cannot_be_worn_says_why(
    tiny_base: Path, tiny_folders: Folders, name: str, words: tuple[str, ...]
) -> None:
    async def main() -> None:
        engine = healthy(tiny_base, tiny_folders)
        with pytest.raises(AdapterLoadFailed) as failure:
            await complete(engine, request("x", tiny_folders.refs[name]))
        assert all(word in str(failure.value) for word in words), failure.value
        await engine.aclose()

    asyncio.run(main())


def test_many_requests_share_one_load_and_one_failure(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    folders = Folders({})
    folders.refs, folders.folders = tiny_folders.refs, tiny_folders.folders

    async def main() -> None:
        engine = healthy(tiny_base, folders)
        for name, kind in (("a", Result), ("missing", AdapterLoadFailed)):
            results = await complete_all(
                engine, [request([i], folders.refs[name], max_tokens=2) for i in range(20)]
            )
            assert all(isinstance(result, kind) for result in results)
            assert folders.asked.count(folders.refs[name].digest) == 1
        with pytest.raises(AdapterLoadFailed):  # remembered for a second, then tried again
            await engine.warm(folders.refs["missing"])
        assert folders.asked.count(folders.refs["missing"].digest) == 1
        await asyncio.sleep(1.1)
        with pytest.raises(AdapterLoadFailed):
            await engine.warm(folders.refs["missing"])
        assert folders.asked.count(folders.refs["missing"].digest) == 2
        await engine.aclose()

    asyncio.run(main())


def test_an_ended_load_is_shared_until_nobody_holds_it(tiny_folders: Folders) -> None:
    """Whoever asks while the adapter is on its way from there into a slot reads no file again."""
    reads: list[str] = []
    ref = tiny_folders.refs["a"]

    def read(_: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        reads.append(ref.digest)
        return HostAdapter(ref.digest, 8, torch.zeros(8))

    loader = AdapterLoader(tiny_folders, read, lambda _: 0, budget=0, room=0)
    held = loader.load(ref)
    assert held.result(20).digest == ref.digest
    assert loader.load(ref) is held
    assert reads == [ref.digest]
    gone = weakref.ref(held)
    del held
    while gone() is not None:  # the worker lets go of it in its own time
        time.sleep(0.001)
    assert loader.load(ref).result(20).digest == ref.digest
    assert reads == [ref.digest] * 2
    loader.close()


class Unchecked(StoredFiles):
    """Bytes whose check begins when it is let, and finds `wrong`."""

    gate = threading.Event()
    wrong: Exception | None = None

    def check(self) -> None:
        assert self.gate.wait(20)
        if self.wrong:
            raise self.wrong


class Found(FoundFiles):
    """Files that are in memory."""


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("wrong", [None, IntegrityError("it is damaged")])
def test_what_is_read_beside_its_check_is_nobody_s_before_that_ends(
    wrong: Exception | None, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unchecked, "gate", threading.Event())
    monkeypatch.setattr(Unchecked, "wrong", wrong)
    data = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"numbers"}
    stored = Unchecked(cast(Version, None), data, Path(), None)
    found = Found(cast(Version, None), Path(), None)
    monkeypatch.setattr(Found, "read", lambda _: stored)
    was_read = threading.Event()

    def read(source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        assert source == AdapterFiles(b"{}", [b"numbers"])
        was_read.set()
        if not readable:
            raise AdapterLoadFailed("these are no tensors")
        return HostAdapter(ref.digest, 8, torch.zeros(8))

    loader = AdapterLoader(lambda _: found, read, lambda _: 0, budget=0, room=0)
    load = loader.load(AdapterRef("a" * 64, "tiny/a@v1"))
    assert was_read.wait(20), "while the check waits"
    time.sleep(0.05)
    assert not load.done()
    Unchecked.gate.set()
    expected = "it is damaged" if wrong else None if readable else "these are no tensors"
    if expected:
        with pytest.raises(AdapterLoadFailed, match=expected):
            load.result(20)
    else:
        assert load.result(20).digest == "a" * 64
    loader.close()


def test_files_that_were_swept_while_their_load_waited_are_fetched_again(
    wardrobe: Wardrobe,
) -> None:
    """A load that waits for an hour looks like one of a dead process."""
    registry = wardrobe.registry
    held, waiting = (AdapterRef(wardrobe.push(), f"acme/support@v{n}") for n in (1, 2))
    folder = registry.home / "versions"

    def read(source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        return HostAdapter(ref.digest, 8, torch.zeros(8))

    loader = AdapterLoader(registry.find_files, read, lambda _: 1, budget=0, room=1)
    first = loader.load(held)
    first.result(20)
    load = loader.load(waiting)
    while not loader.before(waiting.digest):
        time.sleep(0.001)
    [staged] = folder.glob(".tmp-*")
    os.utime(staged, (1, 1))
    Registry.open(registry.home, registry.bases).close()
    assert not staged.exists()
    del first
    loader.advance()
    assert load.result(20).digest == waiting.digest
    assert {path.name for path in folder.iterdir()} == {held.digest, waiting.digest}
    loader.close()


def test_a_slow_load_holds_up_nobody_else(tiny_base: Path, tiny_folders: Folders) -> None:
    gate = threading.Event()

    def slow(ref: AdapterRef) -> Path:
        if ref == tiny_folders.refs["b"]:
            gate.wait(20)
        return tiny_folders(ref)

    async def main() -> None:
        engine = healthy(tiny_base, slow)
        waiting = asyncio.create_task(complete(engine, request("x", tiny_folders.refs["b"])))
        await asyncio.sleep(0.05)
        for ref in (tiny_folders.refs["a"], None):
            assert (await complete(engine, request("x", ref, max_tokens=3))).finish == "length"
        assert not waiting.done()
        gate.set()
        assert (await waiting).finish == "length"
        await engine.aclose()

    asyncio.run(main())


def test_a_request_that_waits_for_a_slot_is_not_starved_by_a_stream_of_others(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = EngineSettings(
        device="cpu", dtype="float32", max_running=4, max_model_len=128, adapter_slots=1
    )
    refs = tiny_folders.refs

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, settings)
        stop = asyncio.Event()

        async def keep_asking() -> None:
            while not stop.is_set():
                await complete(engine, request("x", refs["a"], max_tokens=5))

        crowd = [asyncio.create_task(keep_asking()) for _ in range(3)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            await complete(engine, request("y", refs["b"], max_tokens=5))
            await engine.warm(refs["c"])
        stop.set()
        await asyncio.gather(*crowd)
        await engine.aclose()

    asyncio.run(main())


def test_a_dead_step_thread_is_unhealthy_and_ends_every_request(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    async def main() -> None:
        engine = poisoned(tiny_base, tiny_folders, SystemExit)
        running = asyncio.create_task(complete(engine, request([1], max_tokens=100)))
        await until(engine, lambda stats: stats.running == 1)
        with pytest.raises(EngineUnavailable, match="died"):
            await complete(engine, request(POISON))
        with pytest.raises(EngineUnavailable, match="died"):
            await running
        with pytest.raises(EngineUnavailable, match="died"):
            await engine.check_health()
        with pytest.raises(EngineUnavailable, match="died"):
            await complete(engine, request([1]))
        await engine.aclose()

    asyncio.run(main())


def test_an_abort_frees_its_place_and_its_pin_before_the_next_step(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    core = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS).core
    refs = tiny_folders.refs
    crowd = [Sequence(request("x", refs[n], max_tokens=50)) for n in "aab"]
    with torch.inference_mode():
        while not all(core.residency.ensure(refs[name]) for name in "ab"):
            time.sleep(0.001)  # otherwise those that wear a may end before b is there
        for sequence in crowd:
            core.add(sequence)
        core.step()
        assert len(core.scheduler.running) == 3
        core.abort(crowd[0])
        core.abort(crowd[2])
        core.abort(crowd[2])  # a second one changes nothing
        pins = {n: core.residency.table.pins(refs[n].digest) for n in "ab"}
        assert pins == {"a": 1, "b": 0}
        assert list(core.scheduler.running) == [crowd[1]]
        assert [ticket for ticket, _ in core.step()] == [crowd[1]]
    assert core.counters.aborted == 2
    core.residency.loader.close()


def test_an_idle_engine_uses_no_cpu(tiny_base: Path, tiny_folders: Folders) -> None:
    async def main() -> None:
        engine = healthy(tiny_base, tiny_folders)
        await complete(engine, request("x", tiny_folders.refs["a"]))
        steps = (await engine.stats()).steps
        async with asyncio.timeout(30):
            while engine._core.chores():  # noqa: ASYNC110  # nobody is told of their end
                await asyncio.sleep(0.05)
        wait_for_pages()
        started = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - started < 0.1
        assert (await engine.stats()).steps == steps
        await engine.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("prompt", [[], [258], [-1]])
def test_a_prompt_outside_the_vocabulary_is_refused(
    tiny_base: Path, tiny_folders: Folders, prompt: list[int]
) -> None:
    async def main() -> None:
        engine = healthy(tiny_base, tiny_folders)
        with pytest.raises(RequestRefused):
            await complete(engine, request(prompt))
        await engine.aclose()

    asyncio.run(main())
