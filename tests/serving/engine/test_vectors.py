"""Adapters that are more than LoRA, through the life of slots and sequences."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.engine.boundary import AdapterLoadFailed, GenerateRequest, RequestRefused, TokenDelta
from serving.engine.build import assemble, read_model
from serving.engine.core import EngineCore
from serving.engine.engine import TorchEngine
from serving.engine.linear import PackedLinear
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.peft_cases import CASES, make, other
from tests.serving.engine.driving import Folders, Oracle, base_of, complete, request, run_all

SETTINGS = EngineSettings(
    device="cpu",
    dtype="float32",
    max_running=4,
    max_model_len=128,
    max_batched_tokens=24,
    adapter_host_memory=1 << 30,  # what a test has loaded is there
)
TITLES = (
    "LoRA",
    "DoRA",
    "Prompt tuning",
    "Prefix tuning",
    "`trainable_token_indices`",
    "LN tuning",
)
WHOLE = "`modules_to_save` of embedding, head and norms"
PART = "`modules_to_save` of the embedding, some tokens trained"
PROMPT = [7, 50, 90] * 9

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("adapters")
    cases = {case.title: case for case in CASES}
    return Folders(
        {
            title: make(cases[title], base, folder / str(i))
            for i, title in enumerate((*TITLES, WHOLE, PART))
        }
    )


def new_core(base: Path, folders: Folders, settings: EngineSettings = SETTINGS) -> EngineCore:
    core = assemble(read_model(base_of(base), settings), folders, settings).core
    with torch.inference_mode():
        for ref in folders.refs.values():
            core.residency.loader.load(ref).result(10)
    return core


def tokens(
    core: EngineCore, wanted: Sequence[GenerateRequest], late: Sequence[GenerateRequest] = ()
) -> list[list[int]]:
    """Run the requests to their ends; the late ones come after eight steps."""
    got: dict[object, list[int]] = {}

    def take() -> None:
        for ticket, delta in core.step():
            assert isinstance(delta, TokenDelta), delta
            got.setdefault(ticket, []).extend(delta.token_ids)

    sequences = [Request(each) for each in wanted]
    with torch.inference_mode():
        for sequence in sequences:
            core.add(sequence)
        for _ in range(8):
            take()
        for each in late:
            core.add(Request(each))
        while core.scheduler.running or core.scheduler.waiting:
            take()
    return [got[sequence] for sequence in sequences]


def test_a_slot_keeps_nothing_of_what_was_worn_in_it(base: Path, folders: Folders) -> None:
    """With one slot every adapter follows another one, and plain LoRA follows each of them."""
    titles = (*TITLES, WHOLE, PART)
    order = [title for title in titles for title in (title, "LoRA")]
    core = new_core(base, folders, replace(SETTINGS, adapter_slots=1))
    oracles = {title: Oracle(base, folders.folders[folders.refs[title].digest]) for title in titles}
    for title in order:
        [found] = tokens(core, [request(PROMPT, folders.refs[title], max_tokens=5)])
        assert found == oracles[title].greedy(PROMPT, 5), title
    assert len(core.residency.stacks.vectors) <= 1


def test_dora_is_loaded_without_the_weights_of_the_base_being_written_out(
    base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are as large as the base, and most of the time that a load took."""
    core = assemble(read_model(base_of(base), SETTINGS), folders, SETTINGS).core

    def dense(_: PackedLinear) -> torch.Tensor:
        raise AssertionError("the base's weight was unpacked")

    monkeypatch.setattr(PackedLinear, "dense", dense)
    adapter = core.residency.loader.load(folders.refs["DoRA"]).result(10)
    assert adapter.vectors is not None


def pages(base: Path, folders: Folders, count: int) -> EngineSettings:
    """Return settings with memory for so many adapters of the lowest rank, and a byte less."""
    core = assemble(read_model(base_of(base), SETTINGS), folders, SETTINGS).core
    memory = (count + 1) * core.residency.stacks.page_bytes - 1
    return replace(SETTINGS, adapter_memory=memory, max_lora_rank=8)


@pytest.mark.parametrize("title", TITLES[1:])
def test_vectors_take_adapter_memory_and_lie_in_it(
    base: Path, folders: Folders, title: str
) -> None:
    core = new_core(base, folders, pages(base, folders, 2))
    tiers, stacks = core.residency, core.residency.stacks
    tokens(core, [request(PROMPT, folders.refs["LoRA"], max_tokens=2)])
    assert tiers.used_bytes == stacks.page_bytes
    tokens(core, [request(PROMPT, folders.refs[title], max_tokens=2)])
    assert (tiers.used_bytes, tiers.evictions) == (2 * stacks.page_bytes, 1)
    vectors = tiers.vectors(folders.refs[title])
    assert vectors is not None
    arena = stacks.whole("qkv")[8][0].untyped_storage()
    assert all(each.untyped_storage().data_ptr() == arena.data_ptr() for each in vectors.tensors())


@pytest.mark.parametrize(
    ("count", "why"), [(1, "there is no such"), (2, "what is kept leaves no such")]
)
def test_an_adapter_whose_vectors_find_no_room_is_refused_and_waits_for_nothing(
    base: Path, folders: Folders, count: int, why: str
) -> None:
    """The LoRA takes one page, which is kept where another one is left for one of its rank."""
    tiers = new_core(base, folders, pages(base, folders, count)).residency
    with torch.inference_mode():
        while not tiers.ensure(folders.refs["LoRA"]):
            pass
        if count > 1:
            tiers.keep(folders.refs["LoRA"])
        with pytest.raises(AdapterLoadFailed, match=f"{why} room"):
            tiers.ensure(folders.refs["DoRA"])


@pytest.mark.parametrize(("title", "rows"), [(WHOLE, 2 * 258), (PART, 128)])
@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_of_an_embedding_and_a_head_only_rows_that_are_not_the_bases_take_memory(
    base: Path, folders: Folders, title: str, rows: int, operators: str
) -> None:
    settings = replace(SETTINGS, operators=operators)
    core = assemble(read_model(base_of(base), settings), folders, settings).core
    adapter = core.residency.loader.load(folders.refs[title]).result(10)
    row = 64 * 4 + 8  # its numbers, and its token
    beside = adapter.size_bytes - core.residency.stacks.layout.size(8) * 4
    assert rows * row <= beside < (rows + 40) * row  # norms, whole panels, whole cache lines
    tokens(core, [request(PROMPT, folders.refs[title], max_tokens=2)])
    assert core.residency.used_bytes >= adapter.size_bytes


@pytest.mark.parametrize("module", ["embedding", "head"])
@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_a_matrix_that_nobody_changed_is_the_bases(
    base: Path, tmp_path: Path, module: str, operators: str
) -> None:
    [case] = [case for case in CASES if case.title == f"`modules_to_save` of the {module}"]
    folders = Folders({"still": make(replace(case, noise=0), base, tmp_path / "still")})
    core = new_core(base, folders, replace(SETTINGS, operators=operators))
    assert core.residency.loader.load(folders.refs["still"]).result(10).vectors is None
    wanted = request(PROMPT, folders.refs["still"], max_tokens=5)
    assert tokens(core, [wanted]) == [Oracle(base).greedy(PROMPT, 5)]


@pytest.mark.parametrize("count", [1, 2])
def test_an_embedding_and_a_head_that_find_no_room_are_refused_with_the_cure(
    base: Path, folders: Folders, count: int
) -> None:
    tiers = new_core(base, folders, pages(base, folders, count)).residency
    with (
        torch.inference_mode(),
        pytest.raises(AdapterLoadFailed, match=r"takes \d+ bytes .* with more --adapter-memory"),
    ):
        tiers.ensure(folders.refs[WHOLE])


def test_a_matrix_of_another_base_is_refused_before_it_is_converted(
    base: Path, folders: Folders, tmp_path: Path
) -> None:
    """Nobody pushes it; a base that was replaced under the engine looks like this."""
    other = tiny.make_base(tmp_path / "other", vocab=300)
    core = assemble(read_model(base_of(other), SETTINGS), folders, SETTINGS).core
    with pytest.raises(AdapterLoadFailed, match="embed_tokens: its shape is"):
        core.residency.loader.load(folders.refs[WHOLE]).result(10)


@pytest.mark.parametrize("title", [*TITLES, WHOLE])
def test_a_paused_and_forgotten_request_goes_on_with_the_same_tokens(
    base: Path, folders: Folders, title: str
) -> None:
    wanted = [
        replace(request([i, *PROMPT], folders.refs[title], max_tokens=30), priority="low")
        for i in range(4)
    ]
    alone = [tokens(new_core(base, folders), [each])[0] for each in wanted]
    core = new_core(base, folders)
    late = [request([3] * 20, max_tokens=9) for _ in range(3)]
    assert tokens(core, wanted, late) == alone
    assert core.counters.paused >= 3
    assert all(not layer.any() for layer in (*core.cache.keys, *core.cache.values))


@pytest.mark.parametrize("title", ["Prompt tuning", "Prefix tuning"])
def test_positions_before_the_prompt_count_against_the_length_of_the_model(
    base: Path, folders: Folders, title: str
) -> None:
    wanted = request([1] * 100, folders.refs[title], max_tokens=28)  # 128 without them

    async def main() -> None:
        engine = TorchEngine.create(base_of(base), folders, SETTINGS)
        try:
            await complete(engine, replace(wanted, adapter=None))
            with pytest.raises(RequestRefused, match="positions before them, this model takes 128"):
                await complete(engine, wanted)
            shorter = replace(wanted, prompt_ids=wanted.prompt_ids[:90])
            assert len((await complete(engine, shorter)).tokens) == 28
        finally:
            await engine.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("title", ["Prompt tuning", "Prefix tuning"])
def test_what_a_prompt_begins_with_is_found_again_behind_the_positions(
    base: Path, folders: Folders, title: str
) -> None:
    core = new_core(base, folders)
    wanted = request(PROMPT, folders.refs[title], max_tokens=6)
    first, again = tokens(core, [wanted]), tokens(core, [wanted])
    assert first == again
    assert core.prefixes.found >= 16
    other = replace(wanted, adapter=folders.refs["LoRA"])
    oracle = Oracle(base, folders.folders[folders.refs["LoRA"].digest])
    assert tokens(core, [other]) == [oracle.greedy(PROMPT, 6)]


@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_there_may_be_more_virtual_tokens_than_the_vocabulary_has(
    base: Path, tmp_path: Path, operators: str
) -> None:
    [case] = [case for case in CASES if case.title == "Prompt tuning"]
    long = replace(case, config=other("PromptTuningConfig", num_virtual_tokens=300))
    folders = Folders({"long": make(long, base, tmp_path / "long")})
    settings = replace(SETTINGS, operators=operators, max_model_len=400)
    core = new_core(base, folders, settings)
    oracle = Oracle(base, folders.folders[folders.refs["long"].digest])
    wanted = request(PROMPT, folders.refs["long"], max_tokens=5)
    assert tokens(core, [wanted]) == [oracle.greedy(PROMPT, 5)]


def test_penalties_leave_virtual_tokens_out(base: Path, folders: Folders) -> None:
    wanted = request(PROMPT, folders.refs["Prompt tuning"], repetition_penalty=1.7, max_tokens=8)
    engine = TorchEngine.create(base_of(base), folders, SETTINGS)
    assert len(run_all(engine, [wanted])[0].tokens) == 8
