"""Memory for keys and values: sequences share it, and take of it what they have written."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.engine import core as core_module
from serving.engine import kv_slots
from serving.engine.boundary import EngineUnavailable, GenerateRequest, TokenDelta
from serving.engine.build import assemble, read_model
from serving.engine.core import EngineCore
from serving.engine.kv_cache import BLOCK
from serving.engine.kv_pages import KVPages
from serving.engine.kv_slots import KVSlots
from serving.engine.ops.blocks import copy_blocks
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from serving.engine.spec import ModelSpec
from tests.serving.engine.driving import Folders, base_of, request

TOKEN = 512  # bytes: 2 layers, keys and values, 2 KV heads of 16 numbers of 4 bytes
CPU = torch.device("cpu")


def settings(blocks: int, running: int = 4) -> EngineSettings:
    return EngineSettings(
        device="cpu",
        dtype="float32",
        max_running=running,
        max_batched_tokens=24,
        kv_cache_bytes=blocks * BLOCK * TOKEN,
        adapter_host_memory=1 << 30,  # what a test has loaded is there
    )


def new_core(base: Path, folders: Folders, how: EngineSettings) -> EngineCore:
    core = assemble(read_model(base_of(base), how), folders, how).core
    with torch.inference_mode():
        for name in "ab":
            core.residency.loader.load(folders.refs[name]).result(10)
    return core


def steps(core: EngineCore) -> Iterator[list[tuple[Request, TokenDelta]]]:
    """Run to the end; whoever runs has memory for what it has read, and nobody's is counted twice.

    A step in which nobody gets on would be one of endlessly many.
    """
    idle = 0
    with torch.inference_mode():
        while core.scheduler.running or core.scheduler.waiting:
            before = core.counters.steps
            events = core.step()
            idle = 0 if core.counters.steps > before else idle + 1
            assert idle < 1000, "nobody gets on"
            cache = core.cache
            taken = [cache.held(slot) for slot in range(cache.slots)]
            assert sum(taken) + cache.free_blocks == cache.blocks
            for sequence in (*core.scheduler.running, *core.scheduler.parked):
                assert cache.held(sequence.kv_slot) * BLOCK >= sequence.computed
            got: list[tuple[Request, TokenDelta]] = []
            for ticket, delta in events:
                assert isinstance(ticket, Request)
                assert isinstance(delta, TokenDelta), delta
                got.append((ticket, delta))
            yield got
    assert core.cache.free_blocks == core.cache.blocks


def answers(core: EngineCore, wanted: list[Request]) -> list[list[TokenDelta]]:
    with torch.inference_mode():
        for sequence in wanted:
            core.add(sequence)
    got: dict[Request, list[TokenDelta]] = {sequence: [] for sequence in wanted}
    for events in steps(core):
        for sequence, delta in events:
            got[sequence].append(delta)
    return list(got.values())


def crowd(folders: Folders) -> list[GenerateRequest]:
    """Six requests, greedy and drawn, that grow from 2 blocks to 12."""
    names = ("a", "b", None, "a", None, "b")
    return [
        request(
            [7 + i, 50, 90 - i] * 9,
            folders.refs[name] if name else None,
            max_tokens=150,
            logprobs=2,
            temperature=float(i % 2),
            seed=i,
        )
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("running", [4, 16])  # with 16, two of the paused ones may keep theirs
@pytest.mark.parametrize("prefixes", [0, 1 << 20], ids=["reads-again", "prefix-cache"])
def test_requests_that_outgrow_memory_answer_as_they_do_alone(
    tiny_base: Path, tiny_folders: Folders, prefixes: int, running: int
) -> None:
    how = replace(settings(16, running), prefix_cache_bytes=prefixes)
    wanted = crowd(tiny_folders)
    alone = [answers(new_core(tiny_base, tiny_folders, how), [Request(w)])[0] for w in wanted]
    core = new_core(tiny_base, tiny_folders, how)
    together = answers(core, [Request(each) for each in wanted])
    assert core.counters.paused > 0, "two of them take 24 blocks in the end, and 16 are there"
    assert together == alone
    assert all(not half.any() for half in (*core.cache.keys, *core.cache.values))


def test_one_sequence_may_take_all_the_memory(tiny_base: Path, tiny_folders: Folders) -> None:
    how = settings(12)
    core = new_core(tiny_base, tiny_folders, how)
    assert core.cache.length == 12 * BLOCK
    (deltas,) = answers(core, [Request(request("abcd", max_tokens=12 * BLOCK - 4))])
    assert deltas[-1].finish_reason == "length"
    assert core.counters.paused == 0


def test_a_long_prompt_is_not_overtaken_for_ever_by_short_ones(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """Short ones come one after the other, and there would always be room for the next of them."""
    core = new_core(tiny_base, tiny_folders, settings(12))
    long = Request(request([5] * 150, max_tokens=3))
    began: list[Request] = []
    short = 0
    with torch.inference_mode():
        for _ in range(2):
            core.add(Request(request([9] * 40, max_tokens=20)))
        core.step()
        core.add(long)
    for events in steps(core):
        began += [sequence for sequence, delta in events if delta.completion_tokens == 1]
        if short < 40:
            short += 1
            core.add(Request(request([short] * 20, max_tokens=20)))
    assert len(began) == 43
    assert long in began[:3], "the two before it, and then it"


@pytest.mark.parametrize("running", [4, 16])
def test_a_normal_request_gets_the_memory_of_low_ones(
    tiny_base: Path, tiny_folders: Folders, running: int
) -> None:
    """They lose it at once, not only their places, of which there are enough."""
    how = settings(16, running)
    low = [replace(each, priority="low") for each in crowd(tiny_folders)[:2]]
    alone = [answers(new_core(tiny_base, tiny_folders, how), [Request(each)])[0] for each in low]
    core = new_core(tiny_base, tiny_folders, how)
    lows = [Request(each) for each in low]
    normal = Request(request([3] * 180, max_tokens=5))
    got: dict[Request, list[TokenDelta]] = {each: [] for each in (*lows, normal)}
    order: list[Request] = []
    with torch.inference_mode():
        for each in lows:
            core.add(each)
        for _ in range(20):
            for ticket, delta in core.step():
                assert isinstance(ticket, Request)
                assert isinstance(delta, TokenDelta)
                got[ticket].append(delta)
        assert len(core.scheduler.running) == 2
        core.add(normal)
    for events in steps(core):
        for sequence, delta in events:
            got[sequence].append(delta)
            order += [sequence] if delta.finish_reason else []
    assert order[0] is normal
    assert core.counters.paused >= 1
    assert [got[each] for each in lows] == alone


@pytest.mark.parametrize("size", [27, 39])
def test_low_requests_and_what_they_would_want_soon_make_room_at_once(
    tiny_base: Path, tiny_folders: Folders, size: int
) -> None:
    core = new_core(tiny_base, tiny_folders, settings(40, 16))
    normal = Request(request([3] * (size * BLOCK - 2), max_tokens=2))
    with torch.inference_mode():
        for i in range(4):
            low = request([i] * 30, max_tokens=200)
            core.add(Request(replace(low, priority="low")))
        for _ in range(5):
            core.step()
        assert len(core.scheduler.running) == 4
        core.add(normal)
        core.step()
        assert normal in core.scheduler.running


def test_what_those_that_run_will_want_soon_is_left_to_them(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the newcomer would be paused, or pause them, as soon as they have grown."""
    started: list[bool] = []
    for soon in (core_module.SOON, 0):
        monkeypatch.setattr(core_module, "SOON", soon)
        core = new_core(tiny_base, tiny_folders, settings(16))
        late = Request(request([9] * (7 * BLOCK), max_tokens=1))
        with torch.inference_mode():
            for i in range(2):
                core.add(Request(request([i] * 60, max_tokens=60)))
            core.step()
            core.add(late)
            core.step()
        started.append(late in core.scheduler.running)
    assert started == [False, True]


def test_tenants_do_not_take_memory_from_each_other_without_end(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All come at once, so nobody has had more than the others, and in one pass nobody gets any."""
    core = new_core(tiny_base, tiny_folders, settings(32, 16))
    wanted = [("a", 30)] * 3 + [("b", 70), ("b", 400)]
    requests = [
        Request(replace(request([i] * tokens, max_tokens=2), tenant=tenant))
        for i, (tenant, tokens) in enumerate(wanted)
    ]
    starts, start = 0, core._start

    def count(sequence: Request) -> None:
        nonlocal starts
        starts += 1
        assert starts < 100, "the pass does not end"
        start(sequence)

    monkeypatch.setattr(core, "_start", count)
    got = answers(core, requests)
    assert [deltas[-1].finish_reason for deltas in got] == ["length"] * len(wanted)


def test_a_failed_step_and_an_abort_give_their_memory_back(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = new_core(tiny_base, tiny_folders, settings(16))
    first, second = (Request(request([8] * 60, max_tokens=50)) for _ in "ab")
    with torch.inference_mode():
        core.add(first)
        core.add(second)
        for _ in range(10):
            core.step()
        assert core.cache.free_blocks < core.cache.blocks
        core.abort(first)

        def fail(*_: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(core.runner, "run", fail)
            core.step()
    assert core.cache.free_blocks == core.cache.blocks


def test_addresses_that_the_system_refuses_are_told_by_the_options_that_ask_for_them(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = settings(16)
    model = read_model(base_of(tiny_base), how)

    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(model, "kv_cache", refuse)
    with pytest.raises(EngineUnavailable, match=r"--max-model-len=256 .* --max-running"):
        assemble(model, tiny_folders, how)


# The system's pages, on a CPU


def spec_of(base: Path, head_dim: int) -> ModelSpec:
    return replace(ModelSpec.read(base), head_dim=head_dim)


def resident(cache: KVSlots) -> int:
    """Return the bytes that the system has given for keys and values: smaps of proc(5)."""
    halves = cache.keys[0].untyped_storage(), cache.values[0].untyped_storage()
    here, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            here = any(h.data_ptr() < end and start < h.data_ptr() + h.nbytes() for h in halves)
        elif here and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("gives", [True, False], ids=["given-back", "control"])
def test_memory_of_a_long_sequence_is_there_for_one_in_another_slot(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, gives: bool
) -> None:
    if not gives:
        monkeypatch.setattr(kv_slots, "give_back", lambda _: None)
    spec, length = spec_of(tiny_base, 64), 8192
    cache = KVSlots(spec, 3, length, length // BLOCK, torch.float32, CPU, copy_blocks)
    whole = length * spec.kv_bytes_per_token(torch.float32)
    ones = torch.ones(length, spec.kv_heads, 64)
    one, other = cache.take(), cache.take()
    for slot in (one, other, one):
        assert cache.reserve(slot, length)
        assert not cache.reserve(2, 1)
        for layer in range(spec.layers):
            cache.store(layer, torch.full((length,), slot), torch.arange(length), ones, ones)
        assert all(half[slot].all() for half in (*cache.keys, *cache.values))
        cache.release(slot)
        assert not any(half.any() for half in (*cache.keys, *cache.values))
    assert (resident(cache) < 1.2 * whole) is gives


def test_slots_may_be_more_addresses_than_there_is_memory(tiny_base: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this Linux gives no more addresses than it has memory")
    spec, length = spec_of(tiny_base, 128), 1 << 22
    cache = KVSlots(spec, 64, length, 8, torch.float32, CPU, copy_blocks)
    assert sum(half.nbytes for half in cache.keys) >= 1 << 39
    slot = cache.take()
    assert cache.reserve(slot, 8 * BLOCK)
    far = torch.tensor([8 * BLOCK - 1])
    heads = torch.ones(1, spec.kv_heads, 128)
    cache.store(1, torch.tensor([slot]), far, heads, heads)
    assert cache.keys[1][slot, :, far].all()


# Pages of the engine's own


@pytest.mark.parametrize("seed", range(3))
def test_pages_hold_what_slots_hold_whoever_comes_and_goes(tiny_base: Path, seed: int) -> None:
    """The same reservations, writes, copies and releases on both; what is held is compared."""
    rng, spec = random.Random(seed), spec_of(tiny_base, 8)
    kept = [torch.zeros(4, 2, spec.layers, spec.kv_heads, BLOCK * 8) for _ in "ab"]
    slots = KVSlots(spec, 5, 100, 17, torch.float32, CPU, copy_blocks)
    pages = KVPages(spec, 5, 100, 17, torch.float32, CPU)
    lengths: dict[int, int] = {}
    refused = copied = 0
    for _ in range(400):
        act = rng.random()
        if act < 0.2 and len(lengths) < 5:
            taken = slots.take()
            assert pages.take() == taken
            lengths[taken] = 0
        elif act < 0.75 and lengths:
            slot, more = rng.choice(list(lengths)), rng.randint(1, 30)
            stop = min(lengths[slot] + more, 100)
            has_room = slots.reserve(slot, stop)
            assert pages.reserve(slot, stop) is has_room
            refused += not has_room
            if has_room:
                write(slots, pages, slot, lengths[slot], stop)
                lengths[slot] = stop
        elif act < 0.9 and lengths:
            slot = rng.choice(list(lengths))
            blocks = lengths[slot] // BLOCK
            places = rng.sample(range(4), min(blocks, 4))
            first = rng.randint(0, blocks - len(places))
            outcome = [
                cache.copy_out(room, places, slot, first)
                for cache, room in zip((slots, pages), kept, strict=True)
            ]
            assert outcome == [True, True]
            assert torch.equal(*kept)
            for cache, room in zip((slots, pages), kept, strict=True):
                cache.copy_in(room, places[::-1], slot)
            copied += bool(places)
        elif lengths:
            slot = rng.choice(list(lengths))
            del lengths[slot]
            slots.release(slot)
            pages.release(slot)
        check_same(slots, pages, lengths)
    assert refused > 5
    assert copied > 20


def write(slots: KVSlots, pages: KVPages, slot: int, start: int, stop: int) -> None:
    positions = torch.arange(start, stop)
    whose = torch.full_like(positions, slot)
    for layer, own in enumerate(slots.keys):
        keys, values = torch.randn(2, stop - start, own.shape[1], own.shape[3])
        slots.store(layer, whose, positions, keys, values)
        pages.store(layer, whose, positions, keys, values)


def check_same(slots: KVSlots, pages: KVPages, lengths: dict[int, int]) -> None:
    pages.settle()
    assert slots.free_blocks == pages.free_blocks
    held = [
        int(page) for slot in range(5) for page in pages.table[slot, : pages.held(slot)].tolist()
    ]
    assert len(set(held)) == len(held) == pages.blocks - pages.free_blocks
    for slot, length in lengths.items():
        halves = zip((*slots.keys, *slots.values), (*pages.keys, *pages.values), strict=True)
        for own, cut in halves:
            there = cut[pages.table[slot].long()].transpose(0, 1).flatten(1, 2)
            assert torch.equal(there[:, :length], own[slot, :, :length])


def test_what_is_not_finite_is_not_kept_from_pages(tiny_base: Path) -> None:
    spec = spec_of(tiny_base, 8)
    kept = torch.zeros(2, 2, spec.layers, spec.kv_heads, BLOCK * 8)
    cache = KVPages(spec, 2, 64, 8, torch.float32, CPU)
    slot = cache.take()
    assert cache.reserve(slot, 2 * BLOCK)
    heads = torch.ones(1, spec.kv_heads, 8)
    where = torch.tensor([slot]), torch.tensor([BLOCK + 3])
    cache.store(0, *where, heads, heads * torch.inf)
    assert cache.copy_out(kept, [0], slot, 0)
    assert not cache.copy_out(kept, [0, 1], slot, 0)
