"""Loads in the memory that is for adapters on their way: each waits until it fits, in its turn."""

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from weakref import ref as weak

import pytest
import torch

from registry.adapter import AdapterRef
from registry.materialize import FoundFiles
from registry.records import Version
from serving.engine import loader as loading
from serving.engine import residency
from serving.engine.adapter_file import AdapterReader
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed
from serving.engine.build import assemble, read_model
from serving.engine.core import EngineCore
from serving.engine.engine import TorchEngine
from serving.engine.lora import HostAdapter
from serving.engine.residency import Residency
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.peft_cases import CASES, make
from tests.serving.engine.driving import (
    Folders,
    base_of,
    complete,
    complete_all,
    request,
)

SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_running=4, max_model_len=64, adapter_host_memory=0
)
LARGE, SMALL = ("x", "y", "z"), "small"


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three of rank 128 and a small one."""
    folder = tmp_path_factory.mktemp("turns")
    ranks = {**dict.fromkeys(LARGE, 128), SMALL: 8}
    return Folders(
        {
            name: tiny.make_adapter(folder / name, tiny_base, rank=rank, seed=seed)
            for seed, (name, rank) in enumerate(ranks.items())
        }
    )


def new_core(base: Path, folders: Folders, **settings: Any) -> EngineCore:
    limits = replace(SETTINGS, **settings)
    return assemble(read_model(base_of(base), limits), folders, limits).core


def measured(base: Path, folders: Folders, name: str, operators: OperatorsName = "auto") -> int:
    """Return what a load is taken to need."""
    settings = replace(SETTINGS, operators=operators)
    model = read_model(base_of(base), settings)
    layout = assemble(model, folders, settings).core.residency.stacks.layout
    reader = AdapterReader(layout, model.dtype, 256, model.base_layers, model.library)
    return reader.measure(folders.folders[folders.refs[name].digest])


def never(happens: Callable[[], bool]) -> None:
    """Give it some time."""
    for _ in range(20):
        time.sleep(0.005)
        assert not happens()


def until(happens: Callable[[], bool]) -> None:
    while not happens():
        time.sleep(0.001)


def reads(core: EngineCore) -> int:
    return core.residency.loader.stages()[1].count


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("operators", ["auto", "torch"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.outcome == "worn"], ids=lambda case: case.title
)
def test_what_a_load_takes_is_known_from_its_header(
    tiny_base: Path, tmp_path: Path, case: Any, operators: OperatorsName
) -> None:
    folders = Folders({"a": make(case, tiny_base, tmp_path / "a")})
    core = new_core(tiny_base, folders, operators=operators)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    taken = core.residency.loader.load(folders.refs["a"]).result(10).size_bytes
    known = measured(tiny_base, folders, "a", operators)
    # Beside it a GPU has a copy in pages that stay, of which torch takes a power of two.
    pinned = 0 if operators == "auto" else 1 << (taken - 1).bit_length()
    assert weights.stat().st_size + taken + pinned <= known
    core.residency.loader.close()


def test_a_load_waits_until_it_fits_and_the_next_one_behind_it(
    tiny_base: Path, folders: Folders
) -> None:
    """The small one would fit beside the first; it was asked for later."""
    room = measured(tiny_base, folders, "x") + measured(tiny_base, folders, SMALL)
    core = new_core(tiny_base, folders, loading_memory=room)
    loader, refs = core.residency.loader, folders.refs
    held = loader.load(refs["x"])
    held.result(10)
    second = loader.load(refs["y"])
    until(lambda: bool(loader.before(refs["y"].digest)))
    small = loader.load(refs[SMALL])
    never(lambda: second.done() or small.done())
    assert reads(core) == 1, "nothing of it was read"
    assert loader.before(refs["y"].digest) == {refs["x"].digest}
    until(lambda: bool(loader.before(refs[SMALL].digest)))
    assert loader.before(refs[SMALL].digest) == {refs["x"].digest, refs["y"].digest}
    del held
    loader.advance()
    assert second.result(10).bucket == 128
    assert small.result(10).bucket == 8
    loader.close()


def test_a_closed_loader_leaves_no_staged_files(
    tiny_base: Path, folders: Folders, tmp_path: Path
) -> None:
    """It has room again, but no worker has begun with it."""
    core = new_core(tiny_base, folders, loading_memory=1)
    loader, refs = core.residency.loader, folders.refs
    staged = shutil.copytree(folders.folders[refs["y"].digest], tmp_path / "staged")
    release = threading.Event()

    def fetch(ref: AdapterRef) -> Path | FoundFiles:
        if ref == refs["y"]:
            return FoundFiles(cast("Version", None), tmp_path / "folder", staged)
        if ref != refs["x"]:
            release.wait(10)
        return folders(ref)

    loader._fetch = fetch
    held = loader.load(refs["x"])
    held.result(10)
    waits = loader.load(refs["y"])
    until(lambda: bool(loader.before(refs["y"].digest)))
    busy = [loader.load(refs[name]) for name in ("z", SMALL)]
    del held
    loader.advance()
    loader.close()
    assert staged.exists()
    release.set()
    until(lambda: not staged.exists())
    assert not waits.done()
    del busy


def test_a_load_that_nobody_waits_for_any_more_is_not_read(
    tiny_base: Path, folders: Folders
) -> None:
    core = new_core(tiny_base, folders, loading_memory=1)
    loader, refs = core.residency.loader, folders.refs
    held = loader.load(refs["x"])
    held.result(10)
    given_up, last = loader.load(refs["y"]), loader.load(refs["z"])
    never(lambda: reads(core) > 1)
    del held, given_up
    loader.advance()
    assert last.result(10).bucket == 128
    assert reads(core) == 2
    loader.close()


def test_files_that_were_handed_over_and_not_asked_for_make_way(
    tiny_base: Path, folders: Folders
) -> None:
    core = new_core(tiny_base, folders, loading_memory=1)
    tiers, refs = core.residency, folders.refs
    folder = folders.folders[refs["x"].digest]
    config, weights = (
        (folder / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    files = AdapterFiles(config, [weights])
    ahead = tiers.begin(refs["x"], 0, files)
    assert ahead is not None, "alone it may take more than the room"
    ahead.result(10)
    assert tiers.begin(refs["z"], 0, files) is None, "it would have to wait, with its files"
    del ahead
    assert tiers.loader.load(refs["y"]).result(10).bucket == 128
    tiers.loader.close()


class Alive:
    """How many adapters are in host memory when one is read, that one left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        self._weights: list[weak[torch.Tensor]] = []
        read, lock = AdapterReader.read, threading.Lock()

        def counted(reader: AdapterReader, source: Any, ref: AdapterRef) -> HostAdapter:
            with lock:
                self.counts.append(sum(each() is not None for each in self._weights))
            adapter = read(reader, source, ref)
            with lock:
                self._weights.append(weak(adapter.weights))
            return adapter

        monkeypatch.setattr(AdapterReader, "read", counted)


@pytest.mark.parametrize(("memory", "counts"), [(1, range(1)), (None, range(2, 12))])
def test_many_requests_for_many_adapters_are_answered_with_as_few_at_once_as_fit(
    tiny_base: Path,
    folders: Folders,
    memory: int | None,
    counts: range,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = Alive(monkeypatch)
    folder = folders.folders[folders.refs["x"].digest]
    refs = [AdapterRef(f"{i:064x}", f"tiny/{i}@v1") for i in range(24)]
    settings = replace(SETTINGS, loading_memory=memory, adapter_slots=2)

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), lambda _: folder, settings)
        async with asyncio.timeout(60):
            results = await complete_all(engine, [request("x", ref, max_tokens=4) for ref in refs])
        assert [each for each in results if isinstance(each, BaseException)] == []
        await engine.aclose()

    asyncio.run(main())
    assert len(alive.counts) >= len(refs)
    assert max(alive.counts) in counts


def ask(tiers: Residency, wanted: list[AdapterRef]) -> list[bool]:
    """Ask in this order, as a pass over the waiting does."""
    digests = [ref.digest for ref in wanted]
    tiers.forget_unwanted(digests)
    found = [tiers.ensure(ref) for ref in wanted]
    tiers.forget_unwanted(digests)
    time.sleep(0.005)
    return found


def test_who_is_asked_for_first_has_the_room_of_one_that_waits_for_a_slot(
    tiny_base: Path, folders: Folders
) -> None:
    core = new_core(tiny_base, folders, loading_memory=1, adapter_slots=1)
    tiers, (x, y, _, small) = core.residency, folders.refs.values()
    with torch.inference_mode():
        while not tiers.ensure(x):
            pass
        tiers.table.pin(x.digest)
        ask(tiers, [y])
        while tiers.is_loading(y):
            ask(tiers, [y])
        for _ in range(20):
            ask(tiers, [y, small])
        assert tiers.is_loading(small), "the other one is first, and takes all the room"
        while tiers.is_loading(small):
            ask(tiers, [small, y])
        assert tiers.is_loading(y), "it stands behind"
        tiers.table.unpin(x.digest)
        while not ask(tiers, [small, y])[0]:
            pass
        while not ask(tiers, [y])[0]:
            pass
    tiers.loader.close()


def test_who_is_asked_for_first_leaves_a_load_that_has_ended_its_turn(
    tiny_base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was the latest one, and was read again although a slot was free."""
    monkeypatch.setattr(residency, "MAX_LOADS", 2)
    core = new_core(tiny_base, folders)
    tiers, (slow, ended, first, _) = core.residency, folders.refs.values()
    release = threading.Event()

    def fetch(ref: AdapterRef) -> Path:
        if ref == slow:
            release.wait(10)
        return folders(ref)

    tiers.loader._fetch = fetch
    with torch.inference_mode():
        ask(tiers, [slow, ended])
        until(lambda: not tiers.is_loading(ended))
        ask(tiers, [first, ended, slow])
        assert ended.digest in tiers.table
        release.set()
        while not all(ask(tiers, [first, ended, slow])):
            pass
    assert reads(core) == 3
    tiers.loader.close()


def test_an_adapter_that_never_fits_is_read_once(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "FAILURE_SECONDS", 0.0)
    core = new_core(tiny_base, tiny_folders, max_lora_rank=32)
    loader, refs = core.residency.loader, tiny_folders.refs

    def failure(ref: AdapterRef) -> BaseException:
        error = loader.load(ref).exception(10)
        assert error is not None
        return error

    for name in ("wide", "nan", "deep"):
        before = reads(core)
        first = failure(refs[name])
        assert failure(refs[name]) is first
        assert reads(core) == before + 1
        assert first.__traceback__ is None, "its frames would hold the file"
        other = failure(AdapterRef(refs[name].digest, "someone/else@v7"))
        assert str(other).startswith("someone/else@v7 cannot be worn"), "names are one's own"
    for number in (1, 2):
        failure(refs["missing"])
        assert tiny_folders.asked.count(refs["missing"].digest) >= number
    loader.close()


def page_bytes(core: EngineCore) -> int:
    return core.residency.stacks.page_bytes


@pytest.fixture(scope="module")
def wide(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A plain one, and one that takes a page more than its rank says."""
    folder = tmp_path_factory.mktemp("wide")
    [dora] = [case for case in CASES if case.title == "DoRA"]
    return Folders(
        {
            "plain": tiny.make_adapter(folder / "plain", tiny_base, rank=8),
            "more": make(dora, tiny_base, folder / "more"),
        }
    )


def test_an_adapter_without_room_is_read_once_and_again_when_there_is_some(
    tiny_base: Path, wide: Folders
) -> None:
    memory = 2 * page_bytes(new_core(tiny_base, wide))
    settings = replace(SETTINGS, adapter_memory=memory, max_lora_rank=8)
    plain, more = wide.refs["plain"], wide.refs["more"]

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), wide, settings)
        await engine.keep(plain)
        for _ in range(3):
            with pytest.raises(AdapterLoadFailed, match="what is kept leaves no such room"):
                await complete(engine, request("x", more, max_tokens=2))
            with pytest.raises(AdapterLoadFailed, match="what is kept leaves no such room"):
                await engine.warm(more)
        stats = await engine.stats()
        assert (stats.load_stages[1].count, stats.loading) == (2, ())
        await engine.release(plain)
        assert (await complete(engine, request("x", more, max_tokens=2))).finish == "length"
        assert (await engine.stats()).load_stages[1].count == 3
        await engine.aclose()

    asyncio.run(main())


def test_a_refusal_holds_no_memory(tiny_base: Path, wide: Folders) -> None:
    """Whoever was refused may keep the error for long, and others wait for the room."""
    memory = page_bytes(new_core(tiny_base, wide))
    core = new_core(tiny_base, wide, adapter_memory=memory, max_lora_rank=8, loading_memory=1)
    tiers, (plain, more) = core.residency, wide.refs.values()

    def refused() -> None:
        while not ask(tiers, [more])[0]:
            pass

    with torch.inference_mode():
        with pytest.raises(AdapterLoadFailed, match="there is no such room") as error:
            refused()
        while not ask(tiers, [plain])[0]:
            pass
    assert error.value.__traceback__ is not None
    tiers.loader.close()
