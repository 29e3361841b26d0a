"""Adapters that come, go and come back through all tiers, in one arena for all ranks."""

import asyncio
import contextlib
import ctypes
import json
import shutil
from collections.abc import Callable
from collections.abc import Sequence as Rows
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engine import residency
from serving.engine.boundary import AdapterLoadFailed
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.sequence import Sequence
from serving.engine.settings import EngineSettings, OperatorsName
from serving.engine.slots import BUCKETS
from tests import tiny
from tests.serving.engine.driving import (
    Folders,
    Oracle,
    base_of,
    complete,
    complete_all,
    request,
    run_all,
)

BOUND = 1e-4  # of a log-probability, as against PEFT elsewhere
SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=8, max_model_len=64)


@pytest.fixture(scope="module")
def ranks(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """An adapter for each bucket."""
    folder = tmp_path_factory.mktemp("ranks")
    return Folders(
        {
            str(rank): tiny.make_adapter(folder / str(rank), tiny_base, rank=rank, seed=rank)
            for rank in BUCKETS
        }
    )


def arena(base: Path, folders: Folders, pages: int) -> int:
    """Return the bytes of so many pages."""
    parts = assemble(read_model(base_of(base), SETTINGS), folders, SETTINGS)
    parts.core.residency.loader.close()
    return pages * parts.core.residency.stacks.page_bytes


@pytest.mark.parametrize(("operators", "piece"), [("auto", 1 << 20), ("torch", 300_000)])
def test_every_rank_computes_what_peft_does_each_time_it_comes_back(
    tiny_base: Path, ranks: Folders, operators: OperatorsName, piece: int
) -> None:
    """Memory for one adapter of rank 256: each one comes into pages that the others have used."""
    settings = replace(SETTINGS, adapter_memory=arena(tiny_base, ranks, 32), operators=operators)
    order = ("256", "8", "128", "16", "64", "32") * 2
    prompts = [[3 * i, 40 + i, 90] for i in range(len(order))]

    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), settings), ranks, settings)
        parts.core.residency.copy_bytes = piece
        engine = TorchEngine(parts, settings)
        for name, prompt in zip(order, prompts, strict=True):
            asked = request(prompt, ranks.refs[name], max_tokens=6, logprobs=5)
            result = await complete(engine, asked)
            oracle = Oracle(tiny_base, ranks.folders[ranks.refs[name].digest])
            assert result.tokens == oracle.greedy(prompt, 6), name
            assert oracle.largest_error(prompt, result) < BOUND, name
        stats = await engine.stats()
        assert stats.adapter_loads == len(order), "every one had to come back"
        assert stats.adapter_memory_used <= stats.adapter_memory
        await engine.aclose()

    asyncio.run(main())


def test_all_ranks_in_one_batch_share_the_arena(tiny_base: Path, ranks: Folders) -> None:
    """Room for all of them at once, and for none of rank 256 more."""
    settings = replace(SETTINGS, adapter_memory=arena(tiny_base, ranks, 63))
    wanted = [request([7, 7 + i], ref, max_tokens=8) for i, ref in enumerate(ranks.refs.values())]

    def run(limits: EngineSettings) -> list[list[int]]:
        engine = TorchEngine.create(base_of(tiny_base), ranks, limits)
        return [result.tokens for result in run_all(engine, wanted)]

    assert run(settings) == run(SETTINGS)


def test_a_large_adapter_comes_between_steps_in_pieces_and_is_worn_when_it_is_whole(
    tiny_base: Path, ranks: Folders
) -> None:
    settings = replace(SETTINGS, adapter_host_memory=1 << 30)
    core = assemble(read_model(base_of(tiny_base), settings), ranks, settings).core
    large = core.residency.loader.load(ranks.refs["256"]).result(10)
    core.residency.copy_bytes = large.size_bytes // 4
    running = Sequence(request([1], max_tokens=40))
    waiting = Sequence(request([2], ranks.refs["256"], max_tokens=2))
    given_up = Sequence(request([3], ranks.refs["256"], max_tokens=2))
    with torch.inference_mode():
        core.add(running)
        core.step()
        core.add(given_up)
        core.step()
        assert core.residency.filling
        core.abort(given_up)
        core.step()
        assert not core.residency.filling
        assert ranks.refs["256"].digest not in core.residency.table
        core.add(waiting)
        before = running.produced
        while not waiting.produced:
            core.step()
        assert running.produced - before >= 4  # a step for each piece
    core.residency.loader.close()


def test_an_adapter_is_new_for_a_moment_after_it_was_loaded_by_a_call(
    tiny_base: Path, ranks: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = assemble(read_model(base_of(tiny_base), SETTINGS), ranks, SETTINGS).core

    def starts_new(name: str) -> bool:
        sequence = Sequence(request([1], ranks.refs[name], max_tokens=1))
        core.add(sequence)
        while not sequence.produced:
            core.step()
        return sequence.is_new

    monkeypatch.setattr(residency, "NEW_SECONDS", 60.0)
    with torch.inference_mode():
        assert not starts_new("8"), "nobody has called for it"
        core.residency.keep(ranks.refs["8"])
        assert starts_new("8")
        monkeypatch.setattr(residency, "NEW_SECONDS", 0.0)
        assert not starts_new("8")
    core.residency.loader.close()


def cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def misshape(folder: Path) -> None:
    change(folder, lambda tensor: tensor[:, :-1].contiguous())


def spoil(folder: Path) -> None:
    change(folder, lambda tensor: torch.full_like(tensor, torch.inf))


def garble(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 500)


def mismatch(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))


def change(folder: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the last tensor of the file: what is read before it is in order."""
    tensors = load_file(folder / "adapter_model.safetensors")
    last = max(tensors)
    save_file(tensors | {last: how(tensors[last])}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("harm", [cut, misshape, spoil, garble, mismatch])
def test_a_broken_adapter_fails_alone_while_others_run(
    tmp_path: Path, tiny_base: Path, tiny_folders: Folders, harm: Callable[[Path], None]
) -> None:
    good = {name: tiny_folders(tiny_folders.refs[name]) for name in "abc"}
    shutil.copytree(good["b"], tmp_path / "bad")
    harm(tmp_path / "bad")
    folders = Folders(good | {"bad": tmp_path / "bad"})
    settings = replace(SETTINGS, adapter_slots=2)
    wanted = [request([9, i], folders.refs["abc"[i % 3]], max_tokens=12) for i in range(7)]
    alone = run_all(TorchEngine.create(base_of(tiny_base), folders, settings), wanted)

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), folders, settings)
        poison = request("x", folders.refs["bad"], max_tokens=12)
        first, *results = await complete_all(engine, [poison, *wanted])
        assert isinstance(first, AdapterLoadFailed), first
        assert "tiny/bad@v1" in str(first)
        assert results == alone
        assert folders.refs["bad"].digest not in {r.digest for r in (await engine.stats()).resident}
        await engine.aclose()

    asyncio.run(main())


def resident_bytes() -> int:
    """Return what this process has of the machine's memory, without what is free in it."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def swap(base: Path, folders: Folders, memory: int, swaps: int) -> list[int]:
    """Ask for one adapter after the other, none of which is there; return bytes by each 20th."""
    # Memory for a prefix cache is made ready in quiet moments, whenever they come.
    settings = replace(SETTINGS, adapter_memory=memory, prefix_cache_bytes=0)
    refs, resident = list(folders.refs.values()), list[int]()

    async def main() -> None:
        engine = TorchEngine.create(base_of(base), folders, settings)
        for number in range(swaps):
            await complete(engine, request([1, 2], refs[number % len(refs)], max_tokens=1))
            if number % 20 == 19:
                resident.append(resident_bytes())
        assert (await engine.stats()).adapter_loads == swaps
        await engine.aclose()

    asyncio.run(main())
    return resident


def slope(resident: Rows[int]) -> float:
    """Return the bytes that each swap adds, by least squares over the second half."""
    late = np.array(resident[len(resident) // 2 :], float)
    return float(np.polyfit(20 * np.arange(len(late)), late, 1)[0])


def test_swaps_leave_nothing_behind(tiny_base: Path, ranks: Folders) -> None:
    """Keeping what a swap has read would take ten megabytes a round, and these are ten rounds.

    What lies ready for the next one is a round's at most.
    """
    resident = swap(tiny_base, ranks, arena(tiny_base, ranks, 32), 120)
    assert resident[-1] - resident[2] < 20 << 20


@pytest.mark.long
def test_ten_thousand_swaps_take_no_memory(tiny_base: Path, ranks: Folders) -> None:
    resident = swap(tiny_base, ranks, arena(tiny_base, ranks, 32), 10_000)
    assert slope(resident) < 1000


def leak() -> list[int]:
    """Keep a hundredth of what a swap reads each time."""
    kept: list[bytearray] = []
    resident: list[int] = []
    for _ in range(200):
        kept += [bytearray(b"x" * 5000) for _ in range(20)]
        resident.append(resident_bytes())
    return resident


def test_a_leak_would_show() -> None:
    """The measure can tell. In a process of its own: here other tests' memory may go meanwhile."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        assert slope(process.submit(leak).result(120)) > 4000
