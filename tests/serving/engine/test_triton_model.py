"""The model with Triton operators against PEFT, and captured steps against plain ones."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from registry.adapter import AdapterRef
from serving.engine import core, device_step, step_graphs
from serving.engine.batch import Batch
from serving.engine.boundary import EngineStats, GenerateRequest
from serving.engine.build import Parts, assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.kv_cache import BLOCK
from serving.engine.kv_pages import KVPages
from serving.engine.model_runner import ModelRunner
from serving.engine.ops.triton import lora
from serving.engine.ops.triton.vectors import RowPlaces
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Running
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.peft_cases import CASES, make
from tests.serving.engine.driving import (
    Folders,
    Oracle,
    Result,
    base_of,
    complete,
    request,
    run_all,
)
from tests.serving.engine.kernels import (
    new_nan,
    of_pages,
    on_every_device,
    read_triton,
    share_out_to_few,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BOUND = 1e-4
LENGTH = 64
TOKEN = 256  # bytes of keys and values: 2 layers, 2 KV heads of 8 numbers of 4 bytes, twice
SETTINGS = EngineSettings(
    dtype="float32", max_model_len=LENGTH, max_running=4, max_batched_tokens=9
)
SMALL: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out_to_few(monkeypatch)


def triton_parts(
    base: Path, folders: Folders, device: torch.device, settings: EngineSettings = SETTINGS
) -> Parts:
    """Return an engine's parts around the Triton model."""
    model = read_triton(base, device, settings.max_model_len or LENGTH)
    with torch.inference_mode():
        return assemble(model, folders, replace(settings, device=device.type))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), seed=3, hidden=32, **SMALL)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("adapters")
    return Folders(
        {
            "all4": tiny.make_adapter(folder / "all4", base, rank=4, seed=1),
            "attention24": tiny.make_adapter(
                folder / "attention24", base, rank=24, seed=2, targets=tiny.ATTENTION
            ),
            "other4": tiny.make_adapter(folder / "other4", base, rank=4, seed=3),
        }
    )


def asked(folders: Folders, names: Sequence[str | None], tokens: int) -> list[GenerateRequest]:
    return [
        request(
            [(7 * i + j) % 256 for j in range(3 + 4 * i)],
            folders.refs[name] if name else None,
            max_tokens=tokens,
            logprobs=3,
        )
        for i, name in enumerate(names)
    ]


def check_against_peft(base: Path, folders: Folders, device: torch.device) -> None:
    names = [*folders.refs, None]
    wanted = asked(folders, names, tokens=3)
    engine = TorchEngine(triton_parts(base, folders, device), SETTINGS)
    for name, each, result in zip(names, wanted, run_all(engine, wanted), strict=True):
        folder = folders.folders[folders.refs[name].digest] if name else None
        oracle = Oracle(base, folder)
        assert result.tokens == oracle.greedy(each.prompt_ids, 3), name
        assert oracle.largest_error(each.prompt_ids, result) < BOUND, name
        wrong = Oracle(base, None if name else folders.folders[folders.refs["all4"].digest])
        assert wrong.largest_error(each.prompt_ids, result) > 10 * BOUND, name


@on_every_device
def test_a_mixed_batch_equals_peft_one_request_at_a_time(
    base: Path, folders: Folders, device: torch.device
) -> None:
    """Prompts are read in chunks beside decoding rows, and the batch shrinks as requests end."""
    check_against_peft(base, folders, device)


def served(parts: Parts, wanted: Sequence[GenerateRequest]) -> tuple[list[Result], EngineStats]:
    """Return the answers to requests that come together, and the engine's figures after them."""

    async def main() -> tuple[list[Result], EngineStats]:
        engine = TorchEngine(parts, SETTINGS)
        try:
            results = await asyncio.gather(*(complete(engine, each) for each in wanted))
            return results, await engine.stats()
        finally:
            await engine.aclose()

    return asyncio.run(main())


@on_every_device
def test_requests_that_outgrow_the_pages_equal_peft(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages go from one sequence to the next, in any order, and with what was in them."""
    monkeypatch.setattr(core, "SOON", 0)
    names = ["all4", "attention24", None]
    wanted = [
        request(range(start, start + 15), folders.refs[name] if name else None, max_tokens=7)
        for start, name in enumerate(names)
    ]
    few = replace(SETTINGS, kv_cache_bytes=4 * BLOCK * TOKEN, prefix_cache_bytes=0)
    results, stats = served(triton_parts(base, folders, device, few), wanted)
    assert stats.paused > 0
    assert stats.kv_tokens_used == 0
    assert stats.kv_tokens_total == 4 * BLOCK
    for name, each, result in zip(names, wanted, results, strict=True):
        oracle = Oracle(base, folders.folders[folders.refs[name].digest] if name else None)
        assert result.tokens == oracle.greedy(each.prompt_ids, 7), name


@on_every_device
def test_a_known_beginning_is_copied_into_pages(
    base: Path, folders: Folders, device: torch.device
) -> None:
    prompt = [(3 * i) % 256 for i in range(19)]
    ref = folders.refs["all4"]
    parts = triton_parts(base, folders, device)
    first = request(prompt, ref, max_tokens=1, logprobs=3)
    again = request([*prompt[:17], 9, 1], ref, max_tokens=2, logprobs=3)

    async def main() -> list[Result]:
        engine = TorchEngine(parts, SETTINGS)
        try:
            results = [await complete(engine, first), await complete(engine, again)]
            assert (await engine.stats()).prefix_found == BLOCK
            return results
        finally:
            await engine.aclose()

    oracle = Oracle(base, folders.folders[ref.digest])
    for each, result in zip((first, again), asyncio.run(main()), strict=True):
        assert result.tokens == oracle.likeliest(each.prompt_ids, result.tokens)
        assert oracle.largest_error(each.prompt_ids, result) < BOUND


@pytest.mark.gpu
def test_the_engine_takes_the_triton_operators_where_there_is_a_gpu(base: Path) -> None:
    model = read_model(base_of(base), SETTINGS)
    assert model.device.type == "cuda"
    assert model.operators == "Triton"


@pytest.mark.long
@on_every_device
@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "head_dim": 24}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 4}),
    ],
)
def test_every_architecture_equals_peft(
    tmp_path: Path, arch: str, config: dict[str, Any], device: torch.device
) -> None:
    base = tiny.make_base(tmp_path / "base", arch=arch, hidden=32, **(SMALL | config))
    adapters = {"all4": tiny.make_adapter(tmp_path / "a", base, rank=4, seed=1)}
    check_against_peft(base, Folders(adapters), device)


def single_rows(parts: Parts, folders: Folders, names: Sequence[str | None]) -> list[Row]:
    """Return rows of first tokens. The second prompt has another token: its row samples nothing."""
    rows: list[Row] = []
    for slot, name in enumerate(names):
        ref = folders.refs[name] if name else None
        sequence = Running(request([5 + slot] * (2 if slot == 1 else 1), ref))
        rows.append(in_slot(parts, slot, Row(sequence, 0, 1)))
        if ref is not None:
            place(parts, ref)
    return rows


def in_slot(parts: Parts, slot: int, row: Row) -> Row:
    row.sequence.kv_slot = slot
    assert parts.core.cache.reserve(slot, row.stop)
    return row


def held(parts: Parts) -> list[torch.Tensor]:
    """Return the keys and the values of each layer [slots, kv_heads, room, head_dim].

    What a slot does not hold is zero.
    """
    cache = parts.core.cache
    assert isinstance(cache, KVPages)
    blocks = torch.arange(cache.room, device=cache.table.device)
    counts = torch.tensor([cache.held(slot) for slot in range(cache.slots)]).to(blocks)
    own = (blocks < counts[:, None]).repeat_interleave(BLOCK, dim=1)[:, None, :, None]
    return [of_pages(half, cache.table) * own for half in (*cache.keys, *cache.values)]


def place(parts: Parts, ref: AdapterRef) -> None:
    """Put an adapter into a slot, in place of another one where there is no other room."""
    residency = parts.core.residency
    residency.loader.load(ref).result()
    while not residency.ensure(ref):
        pass


SAVED = "`modules_to_save` of embedding, head and norms"
VECTORS = ("DoRA", "Prompt tuning", "Prefix tuning", SAVED)


@pytest.fixture(scope="module")
def more_than_lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("vectors")
    cases = {case.title: case for case in CASES}
    made = {title: make(cases[title], base, folder / str(i)) for i, title in enumerate(VECTORS)}
    return Folders({"all4": tiny.make_adapter(folder / "all4", base, rank=4, seed=1)} | made)


@on_every_device
def test_all_that_an_adapter_can_have_is_worn_beside_lora_and_the_base(
    base: Path, more_than_lora: Folders, device: torch.device
) -> None:
    """`make test-long` has every case of the table in docs/peft.md, in few slots."""
    check_against_peft(base, more_than_lora, device)


@on_every_device
def test_vectors_of_the_gate_are_worn_where_lora_has_high_tiles(
    base: Path, more_than_lora: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in steps of more than 64 rows of prompts."""

    def high(_: int, chunks: int) -> int:
        return lora.PROMPT_HEIGHT if chunks else lora.DECODE_HEIGHT

    monkeypatch.setattr(device_step, "tile_height", high)
    few = Folders(
        {
            name: more_than_lora.folders[more_than_lora.refs[name].digest]
            for name in ("all4", "DoRA")
        }
    )
    check_against_peft(base, few, device)


@on_every_device
def test_a_captured_step_with_vectors_gives_what_the_plain_step_gives(
    base: Path, more_than_lora: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody beside it wears any of it, and what comes into the same slot again is the same."""
    parts = triton_parts(base, more_than_lora, device, replace(SETTINGS, adapter_slots=1))
    first, lora, saved, again = in_turn(
        parts,
        more_than_lora,
        [[None, None, name] for name in ("DoRA", "all4", SAVED, "DoRA")],
        monkeypatch,
    )
    assert torch.equal(first, again)
    for other in (lora, saved):
        close(first[0], other[0])
        assert (first[1] - other[1]).abs().max() > 100 * BOUND


def in_turn(
    parts: Parts,
    folders: Folders,
    steps: Sequence[Sequence[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> list[torch.Tensor]:
    """Return the logits of captured steps, by what their rows wear; held to plain ones."""
    runner = parts.core.runner
    seen: list[torch.Tensor] = []
    with torch.inference_mode():
        for names in steps:
            rows = single_rows(parts, folders, names)
            seen.append(runner.run(rows)[0].clone())
            close(seen[-1], plain(runner, rows, monkeypatch))
    return seen


def plain(runner: ModelRunner, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Return the logits of a step that is not replayed."""
    with monkeypatch.context() as patch:
        patch.setattr(step_graphs.StepGraphs, "run", lambda *_: None)
        return runner.run(rows)[0]


@on_every_device
def test_a_captured_step_gives_what_the_plain_step_gives(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows in a step of four: the dead one writes nothing anywhere."""
    parts = triton_parts(base, folders, device)
    runner = parts.core.runner
    with torch.inference_mode():
        for names in ([None, None, None], ["all4", None, "attention24"]):
            rows = single_rows(parts, folders, names)
            replayed = runner.run(rows)[0].clone()
            assert len(replayed) == 2
            written = held(parts)
            close(replayed, plain(runner, rows, monkeypatch))
            for before, after in zip(written, held(parts), strict=True):
                close(before, after)
                assert after[:3, :, 0].all()
                assert not after[:3, :, 1:].any()
                assert not after[3:].any()


@on_every_device
def test_prompts_and_single_tokens_share_a_captured_step(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_prompts(base, folders, device, monkeypatch, SETTINGS, long=4)


@pytest.mark.long
@on_every_device
def test_long_prompts_share_a_captured_step(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of LoRA are high there, and a prompt takes several tiles of attention."""
    settings = replace(SETTINGS, max_model_len=160, max_batched_tokens=150)
    check_prompts(base, folders, device, monkeypatch, settings, long=80)


def check_prompts(
    base: Path,
    folders: Folders,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    settings: EngineSettings,
    long: int,
) -> None:
    """One row decodes, a prompt of `long` tokens goes on and one of three begins; others are dead.

    What the dead rows compute with is NaN, and it reaches nobody.
    """
    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
    parts = triton_parts(base, folders, device, settings)
    runner = parts.core.runner
    for names in ([None, None, None], ["all4", "attention24", None]):
        with torch.inference_mode():
            singles = single_rows(parts, folders, names)
            runner.run(singles)  # the first token of each
            prompts = [prompt_row(parts, folders, names[1], 1, 1, long)]
            prompts.append(prompt_row(parts, folders, names[2], 3, 0, 3))
            rows = [Row(singles[0].sequence, 0, 1), *prompts]
            replayed = runner.run(rows)[0].clone()
            assert len(replayed) == 3
            written = held(parts)
            close(replayed, plain(runner, rows, monkeypatch))
            for before, after in zip(written, held(parts), strict=True):
                close(before, after)
                for slot, filled in ((0, 1), (1, 1 + long), (2, 1), (3, 3)):
                    assert after[slot, :, :filled].all()
                    assert not after[slot, :, filled:].any()


def prompt_row(
    parts: Parts, folders: Folders, name: str | None, slot: int, start: int, count: int
) -> Row:
    ids = [(5 + slot + 7 * i) % 256 for i in range(start + count)]
    sequence = Running(request(ids, folders.refs[name] if name else None))
    return in_slot(parts, slot, Row(sequence, start, count))


@on_every_device
def test_a_step_without_room_in_any_capture_is_launched_as_it_is(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "CHUNKS", 1)
    parts = triton_parts(base, folders, device)
    ran: list[bool] = []

    def run(
        graphs: step_graphs.StepGraphs, batch: Batch, vectors: RowPlaces
    ) -> torch.Tensor | None:
        hidden = captured(graphs, batch, vectors)
        ran.append(hidden is not None)
        return hidden

    captured = step_graphs.StepGraphs.run
    monkeypatch.setattr(step_graphs.StepGraphs, "run", run)
    alone, other = (prompt_row(parts, folders, None, slot, 0, 3) for slot in (0, 1))
    with torch.inference_mode():
        together, _ = parts.core.runner.run([alone, other])
        first = parts.core.runner.run([alone])[0].clone()
        second = parts.core.runner.run([other])[0].clone()
    assert ran == [False, True, True]
    close(together, torch.cat((first, second)))


@on_every_device
def test_a_swap_of_adapters_captures_nothing_again(
    base: Path, folders: Folders, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slot is worn by three adapters in turn, of two ranks, and by the first one again."""
    parts = triton_parts(base, folders, device, replace(SETTINGS, adapter_slots=1))

    def capture(*_: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(step_graphs, "_capture", capture)
    names = ("all4", "other4", "attention24", "all4")
    first, second, third, again = in_turn(parts, folders, [[name] for name in names], monkeypatch)
    assert torch.equal(first, again)
    for other in (second, third):
        assert (first - other).abs().max() > 100 * BOUND


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
