"""A prefix that was read before: found by the same tenant and adapter only, with the same numbers.

The oracle is an engine without the cache. C++ has to give its numbers to the last bit.
"""

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine import prefix_cache
from serving.engine.boundary import (
    EngineError,
    EngineUnavailable,
    GenerateRequest,
    TokenDelta,
)
from serving.engine.build import assemble, read_model
from serving.engine.core import EngineCore
from serving.engine.kv_cache import BLOCK
from serving.engine.model_runner import Forward
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, base_of, request
from tests.serving.engine.test_faults import POISON, Poisoned

SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_running=6, max_model_len=256, max_batched_tokens=40
)
OFF = replace(SETTINGS, prefix_cache_bytes=0)
TINY_BLOCK = 8192  # bytes: 16 tokens of 2 layers, 2 heads of 16 dimensions, keys and values
SHOTS = [(7 * i + i // 16) % 256 for i in range(70)]  # what several prompts begin with


@dataclass
class Driven:
    """A core without a thread, and what came out of it."""

    core: EngineCore
    deltas: dict[Request, list[TokenDelta]] = field(default_factory=dict)
    failed: dict[Request, EngineError] = field(default_factory=dict)

    def add(self, wanted: GenerateRequest) -> Request:
        sequence = Request(wanted)
        self.deltas[sequence] = []
        self.core.add(sequence)
        return sequence

    def step(self) -> None:
        with torch.inference_mode():
            for ticket, event in self.core.step():
                assert isinstance(ticket, Request)
                if isinstance(event, EngineError):
                    self.failed[ticket] = event
                else:
                    assert event is not None
                    self.deltas[ticket].append(event)
            self.core.store_read()

    def finish(self) -> None:
        while self.core.scheduler.running or self.core.scheduler.waiting:
            self.step()

    def run(self, *wanted: GenerateRequest) -> list[list[TokenDelta]]:
        """Run the requests together, each to its end."""
        sequences = [self.add(each) for each in wanted]
        self.finish()
        return [self.deltas[sequence] for sequence in sequences]

    @property
    def blocks(self) -> int:
        return self.core.prefixes.size_bytes // TINY_BLOCK


def new(
    base: Path, folders: Folders, settings: EngineSettings = SETTINGS, wrap: Any = None
) -> Driven:
    model = read_model(base_of(base), settings)
    core = assemble(wrap(model) if wrap else model, folders, settings).core
    for name in "abc":
        core.residency.loader.load(folders.refs[name]).result(10)
    return Driven(core)


def ask(
    tail: Iterable[int], ref: AdapterRef | None = None, tenant: str = "one", **sampling: Any
) -> GenerateRequest:
    """Return a request whose prompt begins with the shots."""
    sampling = {"max_tokens": 20, "logprobs": 3} | sampling
    return replace(request([*SHOTS, *tail], ref, **sampling), tenant=tenant)


def cached(deltas: Sequence[TokenDelta]) -> int:
    (tokens,) = {delta.cached_tokens for delta in deltas}
    return tokens


def numbers(deltas: Sequence[TokenDelta]) -> list[TokenDelta]:
    """Return what the model computed."""
    return [replace(delta, cached_tokens=0) for delta in deltas]


def logprobs(deltas: Sequence[TokenDelta]) -> torch.Tensor:
    tokens = [token for delta in deltas for token in delta.logprobs]
    return torch.tensor([[t.logprob, *(value for _, value in t.top)] for t in tokens])


def is_clean(core: EngineCore) -> bool:
    """Tell whether nothing is held but what the prefix cache keeps."""
    prefixes = core.prefixes
    held = sum(map(len, prefixes._tenants.values()))
    return (
        not any(layer.any() for layer in (*core.cache.keys, *core.cache.values))
        and not prefixes._reading
        and held * prefixes._blocks.size_bytes == prefixes.size_bytes <= prefixes.capacity_bytes
    )


# The same numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_a_request_whose_prefix_is_known_gets_the_numbers_it_gets_without_the_cache(
    tiny_base: Path, tiny_folders: Folders, dtype: Any, operators: Any
) -> None:
    """In mixed batches of adapters and the base, greedy and drawn, in chunks of any size."""
    how: dict[str, Any] = {"dtype": dtype, "operators": operators}
    refs = [*(tiny_folders.refs[name] for name in "abc"), None]
    first = [ask([i], ref) for i, ref in enumerate(refs)]
    second = [
        ask([200 + i] * (1 + 13 * i), ref, temperature=t, seed=i)
        for i, (ref, t) in enumerate((ref, t) for ref in refs for t in (0.0, 1.0))
    ]
    without = new(tiny_base, tiny_folders, replace(OFF, **how)).run(*second)
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, **how))
    driven.run(*first)
    again = driven.run(*second)
    assert [cached(deltas) for deltas in again] == [64] * 8
    assert {cached(deltas) for deltas in without} == {0}
    if operators == "auto":
        assert list(map(numbers, again)) == without
    elif dtype == "float32":
        for one, other in zip(again, without, strict=True):
            torch.testing.assert_close(logprobs(one), logprobs(other), atol=1e-4, rtol=0)
    assert is_clean(driven.core)


def test_of_a_prompt_that_is_known_whole_the_last_token_is_read_again(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    for length, known in ((64, 48), (65, 64), (15, 0), (16, 0), (17, 16)):
        wanted = request(SHOTS[:length], max_tokens=3, logprobs=2)
        (without,) = new(tiny_base, tiny_folders, OFF).run(wanted)
        driven.run(wanted)
        (again,) = driven.run(wanted)
        assert cached(again) == known
        assert numbers(again) == without


def test_what_was_answered_is_known_when_the_conversation_goes_on(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    opening = ask([1], tiny_folders.refs["a"], max_tokens=60)
    (answer,) = driven.run(opening)
    said = [token for delta in answer for token in delta.token_ids]
    onwards = ask([1, *said, 5, 6, 7], tiny_folders.refs["a"])
    (continued,) = driven.run(onwards)
    assert cached(continued) == (len(opening.prompt_ids) + len(said) - 1) // BLOCK * BLOCK
    assert [numbers(continued)] == new(tiny_base, tiny_folders, OFF).run(onwards)


def test_an_adapter_that_was_evicted_and_loaded_again_finds_its_prefixes(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, adapter_slots=1))
    wanted = ask([1], tiny_folders.refs["a"])
    driven.run(wanted)
    driven.run(ask([1], tiny_folders.refs["b"]))
    assert tiny_folders.refs["a"].digest not in driven.core.residency.table
    (again,) = driven.run(wanted)
    assert cached(again) == 64
    assert [numbers(again)] == new(tiny_base, tiny_folders, OFF).run(wanted)


# Whose a prefix is


def with_key_of(*parts: str) -> Any:
    """Return how a cache would find blocks that knows only these parts of a request."""

    def root(sequence: Request) -> bytes:
        digest = sequence.adapter.digest if sequence.adapter else None
        known = {"tenant": sequence.request.tenant, "digest": digest}
        return hashlib.sha256(repr([known[part] for part in parts]).encode()).digest()

    return root


@pytest.mark.parametrize("forgotten", [None, "tenant", "digest"])
def test_a_prefix_belongs_to_one_tenant_and_one_adapter(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch, forgotten: str | None
) -> None:
    """Nobody else finds it, or waits while it is read. A key that forgets one of the two fails."""
    if forgotten:
        parts = {"tenant", "digest"} - {forgotten}
        monkeypatch.setattr(prefix_cache, "_root", with_key_of(*parts))
    refs = [*(tiny_folders.refs[name] for name in "ab"), None]
    wanted = [ask([9], ref, tenant) for tenant in ("one", "") for ref in refs]
    driven, without = new(tiny_base, tiny_folders), new(tiny_base, tiny_folders, OFF)
    with torch.inference_mode():
        while not all(driven.core.residency.ensure(ref) for ref in refs if ref):
            time.sleep(0.001)  # so that nobody waits for an adapter
    sequences = [driven.add(each) for each in wanted]
    driven.step()
    waited = set(sequences) != set(driven.core.scheduler.running)
    driven.finish()
    found = sum(cached(driven.deltas[sequence]) for sequence in sequences)
    right = [numbers(driven.deltas[sequence]) for sequence in sequences] == [
        without.run(each)[0] for each in wanted
    ]
    faults = {"waited": waited, "found": found > 0, "wrong": not right}
    assert (
        faults
        == {
            None: {"waited": False, "found": False, "wrong": False},
            "tenant": {"waited": True, "found": False, "wrong": False},
            "digest": {"waited": True, "found": True, "wrong": True},
        }[forgotten]
    )
    assert [cached(driven.run(each)[0]) for each in wanted] == [64] * 6


def test_other_tokens_before_a_block_make_it_another_block(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    driven.run(request(SHOTS, max_tokens=1))
    for changed in range(0, 64, 9):
        other = list(SHOTS)
        other[changed] ^= 1
        (deltas,) = driven.run(request(other, max_tokens=1))
        assert cached(deltas) == changed // BLOCK * BLOCK


# What comes in


def test_only_blocks_that_were_read_whole_come_from_a_request_that_is_aborted(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    left = driven.add(ask(range(100)))
    driven.step()
    driven.step()
    assert (left.computed, driven.blocks) == (68, 4), "170 tokens are five steps of 34"
    driven.core.abort(left)
    (again,) = driven.run(ask(range(100)))
    assert cached(again) == 64
    assert [numbers(again)] == new(tiny_base, tiny_folders, OFF).run(ask(range(100)))
    assert is_clean(driven.core)


def test_what_was_read_is_kept_also_where_nobody_had_the_time_to_do_it(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """The next step does it, and an abort; the step itself does not."""
    driven = new(tiny_base, tiny_folders)
    left = driven.add(ask(range(100)))
    with torch.inference_mode():
        driven.core.step()
        assert (left.computed, driven.blocks) == (34, 0)
        driven.core.step()
        assert (left.computed, driven.blocks) == (68, 2)
        driven.core.abort(left)
    assert driven.blocks == 4
    assert is_clean(driven.core)


def test_nothing_comes_from_a_request_whose_numbers_are_not_finite(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    driven.core.residency.loader.load(tiny_folders.refs["huge"]).result(10)
    huge = [driven.add(ask([i], tiny_folders.refs["huge"])) for i in range(2)]
    good = driven.add(ask([1]))
    driven.finish()
    assert set(driven.failed) == set(huge)
    assert driven.blocks == (len(good.tokens) - 1) // BLOCK
    assert [numbers(driven.deltas[good])] == new(tiny_base, tiny_folders, OFF).run(ask([1]))
    assert is_clean(driven.core)


def test_nothing_comes_out_of_a_step_that_failed(tiny_base: Path, tiny_folders: Folders) -> None:
    def breaks(model: Forward) -> Forward:
        return cast("Forward", Poisoned(model, RuntimeError))

    driven = new(tiny_base, tiny_folders, wrap=breaks)
    bad = driven.add(ask([5] * 20 + list(POISON) + [6] * 40))
    driven.finish()
    assert set(driven.failed) == {bad}
    assert driven.blocks == 64 // BLOCK, "two steps of 34 tokens were right, the third one failed"
    (after,) = driven.run(ask([5] * 20))
    assert cached(after) == 64
    assert [numbers(after)] == new(tiny_base, tiny_folders, OFF).run(ask([5] * 20))


# Together


def test_choices_of_one_prompt_read_it_once(tiny_base: Path, tiny_folders: Folders) -> None:
    wanted = [ask([3], temperature=1.0, seed=i) for i in range(5)]
    without = new(tiny_base, tiny_folders, OFF).run(*wanted)
    driven = new(tiny_base, tiny_folders)
    together = driven.run(*wanted)
    assert list(map(numbers, together)) == without
    assert [cached(deltas) for deltas in together] == [0, 64, 64, 64, 64]
    assert driven.core.counters.prompt_tokens == 71 + 4 * 7
    assert (driven.core.prefixes.asked, driven.core.prefixes.found) == (5 * 71, 4 * 64)


def test_a_request_waits_for_what_both_have_in_common_and_no_longer(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders)
    long = driven.add(ask(range(150)))
    short = driven.add(ask([1]))
    other = driven.add(replace(request([4] * 70, max_tokens=2), tenant="one"))
    driven.step()
    assert set(driven.core.scheduler.running) == {long, other}, "others are passed on"
    driven.step()
    assert short.kv_slot < 0, "37 of the 64 tokens were there"
    driven.step()
    assert (short.cached, long.computed) == (64, 111)
    driven.finish()


@pytest.mark.parametrize("how", ["aborted", "paused"])
def test_nobody_waits_for_a_reader_that_has_gone(
    tiny_base: Path, tiny_folders: Folders, how: str
) -> None:
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, max_running=3))
    reader = driven.add(ask(range(150)))
    driven.add(request([4] * 150, max_tokens=30))
    driven.add(request([5] * 150, max_tokens=30))
    waits = driven.add(ask(range(150)))
    driven.step()
    assert waits.kv_slot < 0
    if how == "aborted":
        driven.core.abort(reader)
    else:
        driven.core._pause(reader, driven.core.scheduler.pause(reader))
    assert not driven.core.prefixes.awaited(waits)
    driven.step()
    assert {waits, reader} & set(driven.core.scheduler.running)
    driven.finish()
    assert is_clean(driven.core)


def test_a_normal_request_waits_for_no_low_one(tiny_base: Path, tiny_folders: Folders) -> None:
    driven = new(tiny_base, tiny_folders)
    low = driven.add(replace(ask(range(150)), priority="low"))
    driven.step()
    normal = driven.add(ask(range(150)))
    driven.step()
    assert {low, normal} == set(driven.core.scheduler.running)
    driven.finish()
    assert driven.deltas[low][-1].finish_reason == driven.deltas[normal][-1].finish_reason


def test_a_request_that_was_dropped_from_its_slot_finds_what_it_had_read(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """max_running // 8 is 0: whoever is paused loses keys and values."""
    wanted = [ask([i], temperature=1.0, seed=i, max_tokens=60) for i in range(6)]
    without = [new(tiny_base, tiny_folders, OFF).run(each)[0] for each in wanted]
    driven = new(tiny_base, tiny_folders)
    crowd = [driven.add(each) for each in wanted]
    while len(driven.core.scheduler.running) < 6 or crowd[-1].remaining > 1:
        driven.step()
    for i in range(4):
        driven.add(ask([7], tenant=f"quiet-{i}", max_tokens=4))
    driven.finish()
    assert driven.core.counters.paused >= 3
    assert [numbers(driven.deltas[sequence]) for sequence in crowd] == without
    assert driven.core.counters.prompt_tokens == (71 + 5 * 7) + 4 * 71, "none was read twice"
    assert is_clean(driven.core)


def test_a_tenant_pays_for_what_was_computed_for_it(tiny_base: Path, tiny_folders: Folders) -> None:
    driven = new(tiny_base, tiny_folders)
    counter = driven.core.scheduler.queues["normal"].counter
    driven.run(ask([1], max_tokens=2))
    assert counter("one") == 71 + 2 * 2
    driven.run(ask([1], max_tokens=2))
    assert counter("one") == 71 + 7 + 2 * 2 * 2


# How much


def test_what_was_used_longest_ago_makes_room(tiny_base: Path, tiny_folders: Folders) -> None:
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, prefix_cache_bytes=10 * TINY_BLOCK))
    a, b, c = (request([i] * 70, max_tokens=2) for i in (1, 2, 3))
    for wanted in (a, b, a, c):
        driven.run(wanted)
    assert driven.core.prefixes.size_bytes == driven.core.prefixes.capacity_bytes
    assert [cached(driven.run(each)[0]) for each in (a, c, b)] == [64, 64, 32]


def test_a_tenant_that_floods_the_cache_puts_nobody_else_out(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, prefix_cache_bytes=10 * TINY_BLOCK))
    driven.run(ask([1], tenant="quiet"))
    for i in range(12):
        driven.run(replace(request([i] * 70, max_tokens=2), tenant="noisy"))
    assert cached(driven.run(ask([1], tenant="quiet"))[0]) == 64


def test_of_a_prompt_longer_than_the_cache_the_beginning_is_kept(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders, replace(SETTINGS, prefix_cache_bytes=2 * TINY_BLOCK + 1))
    wanted = [ask(range(100), seed=i, temperature=1.0) for i in range(3)]
    without = new(tiny_base, tiny_folders, OFF).run(*wanted)
    assert list(map(numbers, driven.run(*wanted))) == without
    (again,) = driven.run(wanted[0])
    assert (cached(again), driven.blocks) == (32, 2)


def test_a_cache_of_no_bytes_keeps_nothing_and_lets_nobody_wait(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    driven = new(tiny_base, tiny_folders, OFF)
    both = [driven.add(ask([1])) for _ in range(2)]
    driven.step()
    assert set(driven.core.scheduler.running) == set(both)
    driven.finish()
    assert cached(driven.run(ask([1]))[0]) == 0
    assert (driven.core.prefixes.size_bytes, driven.core.prefixes.capacity_bytes) == (0, 0)


def test_a_bound_that_holds_no_block_or_more_than_there_is_is_refused(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    with pytest.raises(ValueError, match="--prefix-cache-memory=-1"):
        replace(SETTINGS, prefix_cache_bytes=-1)
    for wrong in (TINY_BLOCK - 1, 1 << 60):
        with pytest.raises(
            EngineUnavailable, match=rf"={wrong}: 16 tokens take {TINY_BLOCK} bytes"
        ):
            new(tiny_base, tiny_folders, replace(SETTINGS, prefix_cache_bytes=wrong))


# All of it at once


def campaign(base: Path, folders: Folders, requests: int, seed: int) -> int:
    """Send random requests that share beginnings, abort some; return the tokens found.

    Every answer is compared with that of an engine without the cache, alone.
    """
    rng = random.Random(seed)
    alone = new(base, folders, OFF)
    settings = replace(
        SETTINGS,
        max_running=rng.choice((2, 6, 9)),
        prefix_cache_bytes=rng.choice((3, 20, 500)) * TINY_BLOCK,
    )
    driven = new(base, folders, settings)
    beginnings = [[rng.randrange(256) for _ in range(90)] for _ in range(3)]
    sent: list[Request] = []
    while len(sent) < requests:
        tail = [rng.randrange(256) for _ in range(rng.randrange(1, 40))]
        wanted = replace(
            request(
                rng.choice(beginnings)[: rng.randrange(90)] + tail,
                rng.choice((None, *(folders.refs[name] for name in "abc"))),
                max_tokens=rng.randrange(1, 30),
                logprobs=1,
                temperature=rng.choice((0.0, 1.0)),
                seed=rng.randrange(100),
            ),
            tenant=rng.choice("xxyz"),
            priority=rng.choice(("normal", "normal", "low")),
        )
        sent += [driven.add(wanted) for _ in range(rng.choice((1, 1, 3)))]
        for _ in range(rng.randrange(6)):
            driven.step()
        if rng.random() < 0.2:
            driven.core.abort(rng.choice(sent))
    driven.finish()
    for sequence in sent:
        got = driven.deltas[sequence]
        expected = alone.run(sequence.request)[0]
        assert numbers(got) == expected[: len(got)]
        blocks = driven.core.prefixes._tenants.get(sequence.request.tenant, {})
        there = [key in blocks for key in sequence.block_keys]
        assert there == sorted(there, reverse=True), "a block is never without those before it"
    ended = sum(driven.deltas[s][-1:] != [] for s in sent)
    assert ended > requests // 2
    assert is_clean(driven.core)
    return driven.core.prefixes.found


def test_random_requests_get_the_numbers_they_get_alone(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    assert sum(campaign(tiny_base, tiny_folders, 40, seed) for seed in range(4)) > 1000


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_many_random_requests_get_the_numbers_they_get_alone(
    tiny_base: Path, tiny_folders: Folders, seed: int
) -> None:
    assert campaign(tiny_base, tiny_folders, 700, seed) > 1000
