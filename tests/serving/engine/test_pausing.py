"""Requests that give their place to another tenant: they go on later as if nothing had been."""

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine.boundary import EngineBusy, GenerateRequest, Grammar, TokenDelta
from serving.engine.build import assemble, read_model
from serving.engine.core import EngineCore
from serving.engine.engine import TorchEngine
from serving.engine.grammar import GrammarCompiler
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.serving.engine.driving import Folders, base_of, complete, request, stepped

SETTINGS = EngineSettings(
    device="cpu",
    dtype="float32",
    max_running=4,
    max_model_len=128,
    max_batched_tokens=24,
    adapter_host_memory=1 << 30,  # what a test has loaded is there
)


def new_core(base: Path, folders: Folders) -> EngineCore:
    core = assemble(read_model(base_of(base), SETTINGS), folders, SETTINGS).core
    with torch.inference_mode():
        for name in "ab":
            core.residency.loader.load(folders.refs[name]).result(10)
    return core


def deltas(
    core: EngineCore, wanted: Sequence[Request], late: Sequence[Request] = ()
) -> list[list[TokenDelta]]:
    """Run the requests to their ends; the late ones come after ten steps."""
    got: dict[object, list[TokenDelta]] = {request: [] for request in (*wanted, *late)}
    with torch.inference_mode():
        for sequence in wanted:
            core.add(sequence)
        for _ in range(10):
            take(core, got)
        for sequence in late:
            core.add(sequence)
        while core.scheduler.running or core.scheduler.waiting:
            take(core, got)
    return list(got.values())


def take(core: EngineCore, got: dict[object, list[TokenDelta]]) -> None:
    for ticket, delta in core.step():
        assert isinstance(delta, TokenDelta), delta
        got[ticket].append(delta)


def crowd(folders: Folders, **how: object) -> list[GenerateRequest]:
    """Four long requests: greedy and drawn, of two adapters and the base."""
    refs = folders.refs
    return [
        replace(
            request([7 + i, 50, 90 - i] * 9, ref, max_tokens=40, logprobs=2, temperature=t, seed=i),
            **how,
        )
        for i, (ref, t) in enumerate(((refs["a"], 0.0), (refs["b"], 1.0), (None, 0.0), (None, 1.0)))
    ]


@pytest.mark.parametrize("how", [{"tenant": "noisy"}, {"priority": "low"}])
def test_a_paused_request_gives_the_same_tokens_and_numbers(
    tiny_base: Path, tiny_folders: Folders, how: dict[str, str]
) -> None:
    wanted = crowd(tiny_folders, **how)
    alone = [deltas(new_core(tiny_base, tiny_folders), [Request(each)])[0] for each in wanted]
    core = new_core(tiny_base, tiny_folders)
    late = [replace(request([3] * 20, max_tokens=9), tenant=f"quiet-{i}") for i in range(3)]
    together = deltas(core, [Request(each) for each in wanted], [Request(each) for each in late])
    assert core.counters.paused >= 3
    assert together[: len(wanted)] == alone
    assert core.counters.prompt_tokens == 4 * 27 + 3 * 20  # what was read again counts once
    assert all(not layer.any() for layer in (*core.cache.keys, *core.cache.values))
    assert all(core.residency.table.pins(ref.digest) == 0 for ref in tiny_folders.refs.values())


def test_a_row_that_sat_out_gives_the_same_tokens_and_numbers(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """While prompts of another tenant are read, which takes several steps here."""
    wanted = crowd(tiny_folders, tenant="noisy")[:3]
    alone = [deltas(new_core(tiny_base, tiny_folders), [Request(each)])[0] for each in wanted]
    core = new_core(tiny_base, tiny_folders)
    crowded = [Request(each) for each in wanted]
    got: dict[object, list[TokenDelta]] = {sequence: [] for sequence in crowded}
    rested: Counter[object] = Counter()
    with torch.inference_mode():
        for sequence in crowded:
            core.add(sequence)
        while core.scheduler.running or core.scheduler.waiting:
            if core.counters.steps in (15, 25):
                late = Request(replace(request([3] * 60, max_tokens=2), tenant="quiet"))
                got[late] = []
                core.add(late)
            take(core, got)
            rested.update(each for each in core.scheduler.running if each.sat_out)
    assert not core.counters.paused
    assert [rested[sequence] > 0 for sequence in got] == [True] * 3 + [False] * 2
    assert [got[sequence] for sequence in crowded] == alone


def test_a_paused_request_goes_on_where_it_was_in_its_grammar(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    grammars = GrammarCompiler(tiny_base, tiny.VOCAB, frozenset({tiny.EOS_ID}))

    def held() -> list[Request]:
        walks = [asyncio.run(grammars.start(Grammar("regex", "([a-z]{2}[0-9])*"))) for _ in "abcd"]
        return list(map(Request, crowd(tiny_folders, tenant="noisy"), walks))

    alone = [deltas(new_core(tiny_base, tiny_folders), [each])[0] for each in held()]
    core = new_core(tiny_base, tiny_folders)
    late = [replace(request([3] * 20, max_tokens=9), tenant=f"quiet-{i}") for i in range(3)]
    together = deltas(core, held(), [Request(each) for each in late])
    grammars.close()
    assert core.counters.paused >= 3
    assert together[:4] == alone
    for each in alone:
        written = bytes(token for delta in each for token in delta.token_ids).decode()
        assert re.fullmatch("([a-z]{2}[0-9])*[a-z]{0,2}", written)


def test_a_paused_request_that_is_aborted_leaves_nothing(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    core = new_core(tiny_base, tiny_folders)
    crowded = [Request(each) for each in crowd(tiny_folders, tenant="noisy")]
    with torch.inference_mode():
        for sequence in crowded:
            core.add(sequence)
        while len(core.scheduler.running) < 4:
            core.step()
        core.add(Request(replace(request("x", max_tokens=3), tenant="quiet")))
        core.step()
        assert core.counters.paused == 1
        for sequence in crowded:
            core.abort(sequence)
        while core.scheduler.running:
            core.step()
    assert not core.scheduler.waiting
    assert all(not layer.any() for layer in (*core.cache.keys, *core.cache.values))


def test_a_tenant_s_full_queue_is_full_for_that_tenant_only(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = replace(SETTINGS, max_waiting=0)

    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), settings), tiny_folders, settings)
        permits, engine = stepped(parts), TorchEngine(parts, settings)
        ask = replace(request("x", max_tokens=2), tenant="noisy")
        how = ({"tenant": "quiet"}, {"priority": "low"})
        wanted = [*([ask] * 4), *(replace(ask, **each) for each in how)]
        accepted = [asyncio.create_task(complete(engine, each)) for each in wanted]
        await asyncio.sleep(0)  # now all are in; none ends before the steps may
        with pytest.raises(EngineBusy):
            await complete(engine, ask)
        permits.release(1000)
        assert [result.finish for result in await asyncio.gather(*accepted)] == ["length"] * 6
        await engine.aclose()

    asyncio.run(main())


def test_a_lonely_adapter_does_not_wait_for_long_answers_of_another_tenant(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """Both slots are worn by answers that go on for long; the third adapter gets one at once."""
    settings = replace(SETTINGS, adapter_slots=2)
    core = assemble(read_model(base_of(tiny_base), settings), tiny_folders, settings).core
    refs = tiny_folders.refs
    long = [Request(replace(request("x", refs[n], max_tokens=100), tenant="many")) for n in "ab"]
    lonely = Request(replace(request("y", refs["c"], max_tokens=2), tenant="one"))
    with torch.inference_mode():
        for name in "abc":
            core.residency.loader.load(refs[name]).result(10)
        for sequence in long:
            core.add(sequence)
        while len(core.scheduler.running) < 2:
            core.step()
        core.add(lonely)
        while not lonely.produced:
            core.step()
        assert max(sequence.produced for sequence in long) < 10
        while core.scheduler.running or core.scheduler.waiting:
            core.step()
    assert [sequence.produced for sequence in long] == [100, 100]


def test_many_adapters_of_one_tenant_do_not_keep_the_only_one_of_another_from_loading(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = replace(SETTINGS, max_running=2, adapter_slots=2)
    folder = tiny_folders(tiny_folders.refs["a"])
    core = assemble(read_model(base_of(tiny_base), settings), lambda _: folder, settings).core
    many = [AdapterRef(f"{i:064x}", f"tiny/{i}@v1") for i in range(20)]
    lonely = Request(replace(request("y", tiny_folders.refs["a"], max_tokens=2), tenant="one"))
    with torch.inference_mode():
        for ref in many:
            core.add(Request(replace(request("x", ref, max_tokens=100), tenant="many")))
        while len(core.scheduler.running) < 2:
            core.step()
        core.add(lonely)
        while not lonely.produced:
            core.step()
        assert max(sequence.produced for sequence in core.scheduler.running) < 90
    core.residency.loader.close()


def test_answers_that_wear_all_slots_make_way_for_a_lonely_adapter(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """Places are free and slots are not: others of the same tenant have claimed them already."""
    settings = replace(SETTINGS, adapter_slots=2)
    folder = tiny_folders(tiny_folders.refs["a"])
    core = assemble(read_model(base_of(tiny_base), settings), lambda _: folder, settings).core
    many = [AdapterRef(f"{i:064x}", f"tiny/{i}@v1") for i in range(20)]
    crowd = [
        Request(replace(request("x", ref, max_tokens=100), tenant="many"))
        for ref in many
        for _ in range(2)  # each slot is worn twice
    ]
    lonely = Request(replace(request("y", tiny_folders.refs["c"], max_tokens=2), tenant="one"))
    with torch.inference_mode():
        for sequence in crowd:
            core.add(sequence)
        while len(core.scheduler.running) < 4:
            core.step()
        core.residency.loader.load(tiny_folders.refs["c"]).result(10)
        core.add(lonely)
        before = [sequence.produced for sequence in crowd]
        while not lonely.produced:
            core.step()
        gone = [now.produced - then for now, then in zip(crowd, before, strict=True)]
        assert max(gone) < 10
        while core.scheduler.running or core.scheduler.waiting:
            core.step()
    assert {sequence.produced for sequence in crowd} == {100}
    core.residency.loader.close()
