"""A kept adapter stays in its slot whoever waits, until it is released; one slot stays for all."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed
from serving.engine.build import assemble, read_model
from serving.engine.core import Event, Warm
from serving.engine.engine import TorchEngine
from serving.engine.sequence import Sequence
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import (
    Folders,
    base_of,
    complete,
    complete_all,
    request,
    until,
)

SETTINGS = EngineSettings(
    device="cpu",
    dtype="float32",
    max_running=4,
    max_model_len=64,
    adapter_slots=2,
    adapter_host_memory=1 << 30,
)


def play(
    base: Path,
    folders: Folders,
    body: Callable[[TorchEngine], Awaitable[None]],
    settings: EngineSettings = SETTINGS,
) -> None:
    """Run a body on an engine with two slots for adapters."""

    async def main() -> None:
        engine = TorchEngine.create(base_of(base), folders, settings)
        try:
            async with asyncio.timeout(30):
                await body(engine)
        finally:
            await engine.aclose()

    asyncio.run(main())


def paths(folders: Folders) -> dict[str, Path]:
    return {name: folders.folders[ref.digest] for name, ref in folders.refs.items()}


def resident(stats: object, folders: Folders) -> set[str]:
    names = {ref.digest: name for name, ref in folders.refs.items()}
    return {names[each.digest] for each in stats.resident}  # type: ignore[attr-defined]


def test_others_take_turns_in_what_is_left(tiny_base: Path, tiny_folders: Folders) -> None:
    a, b, c = (tiny_folders.refs[name] for name in "abc")

    async def body(engine: TorchEngine) -> None:
        await engine.keep(a)
        await engine.keep(a)
        for ref in (b, c, b, c):
            await complete(engine, request("x", ref, max_tokens=2))
            assert "a" in resident(await engine.stats(), tiny_folders)
        await engine.release(a)
        await engine.release(a)
        await complete(engine, request("x", b, max_tokens=2))
        await complete(engine, request("x", c, max_tokens=2))
        stats = await until(engine, lambda stats: len(stats.resident) == 2)
        assert resident(stats, tiny_folders) == {"b", "c"}, "a was used least recently"

    play(tiny_base, tiny_folders, body)


def test_no_request_waits_for_ever_beside_a_kept_adapter(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    a, b, c = (tiny_folders.refs[name] for name in "abc")

    async def body(engine: TorchEngine) -> None:
        await engine.keep(a)
        asks = [request("x", ref, max_tokens=8) for ref in (a, b, c, b, c, a)]
        results = await complete_all(engine, asks)
        assert [r for r in results if isinstance(r, BaseException)] == []
        assert "a" in resident(await engine.stats(), tiny_folders)

    play(tiny_base, tiny_folders, body)


def test_a_slot_that_is_claimed_for_another_can_still_be_kept(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """Both slots are worn when c arrives: it claims one, and that one is kept before it drains."""
    core = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS).core
    refs = tiny_folders.refs
    events: list[Event] = []
    with torch.inference_mode():
        for name in "abc":
            core.residency.loader.load(refs[name]).result(10)
        for name in "ab":
            core.add(Sequence(request("x", refs[name], max_tokens=50)))
        core.step()
        core.add(Sequence(request("x", refs["c"], max_tokens=2)))
        core.step()
        [claimed] = core.residency.draining_for(refs["c"])
        [ref] = [ref for ref in refs.values() if ref.digest == claimed]
        keep = Warm(ref, keep=True)
        core.add(keep)
        for _ in range(200):
            events += core.step()
    assert not core.scheduler.running
    assert not core.scheduler.waiting
    assert (keep, None) in events
    assert core.residency.kept == {claimed}
    assert claimed in core.residency.table


def test_what_is_kept_and_asked_at_once_is_asked_in_the_step_that_it_is_there_for(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """As a load call asks: a prompt and a single token, which wait for the load with the wish."""
    core = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS).core
    ref = tiny_folders.refs["a"]
    keep = Warm(ref, keep=True)
    asked = [Sequence(request(prompt, ref, max_tokens=1)) for prompt in ("xyz", "x")]
    for ticket in (keep, *asked):
        core.add(ticket)
    core.residency.loader.load(ref).result(10)
    with torch.inference_mode():
        events = core.step()
    assert {ticket for ticket, _ in events} == {keep, *asked}
    assert (core.counters.steps, core.counters.generated_tokens) == (1, 2)


class Hanging(Folders):
    """Folders that are handed out only once that is allowed."""

    def __init__(self, folders: Folders) -> None:
        super().__init__(paths(folders))
        self.allowed = threading.Event()

    def __call__(self, ref: AdapterRef) -> Path:
        assert self.allowed.wait(30)
        return super().__call__(ref)


def test_a_step_waits_for_a_load_once_when_an_adapter_is_to_be_kept(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    folders = Hanging(tiny_folders)
    core = assemble(read_model(base_of(tiny_base), SETTINGS), folders, SETTINGS).core
    a, b, c = (folders.refs[name] for name in "abc")
    core.add(Warm(a, keep=True))
    assert not core.holds(), "nothing runs that the load would be beside"
    core.add(Sequence(request("x", max_tokens=50)))
    with torch.inference_mode():
        core.step()
        core.add(Warm(b))
        assert not core.holds(), "nobody wants it kept"
        core.add(Warm(c, keep=True))
        assert core.holds()
        assert not core.holds(), "it has been told"
    folders.allowed.set()
    core.residency.loader.load(b).result(10)
    core.add(Warm(b, keep=True))
    assert not core.holds(), "it is in memory"


def test_streams_go_on_beside_a_load_that_hangs(tiny_base: Path, tiny_folders: Folders) -> None:
    folders = Hanging(tiny_folders)

    async def body(engine: TorchEngine) -> None:
        runs = asyncio.create_task(complete(engine, request("x", max_tokens=40)))
        await until(engine, lambda stats: stats.generated_tokens > 2)
        kept = asyncio.create_task(engine.keep(folders.refs["a"]))
        await runs
        assert not kept.done()
        folders.allowed.set()
        await kept

    play(tiny_base, folders, body)


def test_the_last_slot_is_not_kept_and_a_broken_adapter_keeps_none(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    a, b = (tiny_folders.refs[name] for name in "ab")

    async def body(engine: TorchEngine) -> None:
        with pytest.raises(AdapterLoadFailed):
            await engine.keep(tiny_folders.refs["missing"])
        await engine.keep(a)
        with pytest.raises(AdapterLoadFailed, match=r"must stay free for all .* 1 are kept"):
            await engine.keep(b)
        await engine.release(a)
        await engine.keep(b)

    play(tiny_base, tiny_folders, body)


def test_what_is_prefetched_from_its_files_is_fetched_from_nowhere(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    folder, a = paths(tiny_folders)["a"], tiny_folders.refs["a"]
    weights = (folder / "adapter_model.safetensors").read_bytes()
    config = (folder / "adapter_config.json").read_bytes()
    files = AdapterFiles(config, [weights[:100], weights[100:]])

    async def body(engine: TorchEngine) -> None:
        wanted = await complete(engine, request("x", a, max_tokens=4, logprobs=1))
        copy = AdapterRef("0" * 64, "nowhere to be found")
        engine.prefetch(copy, files)
        await until(engine, lambda stats: stats.load_stages[1].count == 2)
        assert await complete(engine, request("x", copy, max_tokens=4, logprobs=1)) == wanted
        assert (await engine.stats()).in_memory == 0, "nothing is kept beside it"
        broken = AdapterRef("1" * 64, "broken")
        engine.prefetch(broken, AdapterFiles(config, [weights[:-1]]))
        with pytest.raises(AdapterLoadFailed, match="cannot be loaded"):
            await complete(engine, request("x", broken, max_tokens=1))

    play(tiny_base, tiny_folders, body, replace(SETTINGS, adapter_host_memory=0))


def test_the_stats_tell_tiers_and_the_parts_of_loading(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    a, b, c = (tiny_folders.refs[name] for name in "abc")

    async def body(engine: TorchEngine) -> None:
        for ref in (a, b, c):
            await engine.warm(ref)
        stats = await until(engine, lambda stats: len(stats.resident) == 2)
        assert (stats.in_memory, stats.loading) == (1, ()), "the one that made room"
        stages = {stage.name: stage for stage in stats.load_stages}
        assert [stages[name].count for name in ("fetch", "read", "place")] == [3, 3, 3]
        assert all(stage.seconds > 0 for stage in stages.values())

    play(tiny_base, tiny_folders, body)
