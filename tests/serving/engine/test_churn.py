"""Signature adapters under churn: one wrong row, slot or leftover shows as a wrong token."""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine import core
from serving.engine.boundary import Grammar
from serving.engine.build import assemble, read_model
from serving.engine.compiled_model import CompiledModel
from serving.engine.engine import TorchEngine
from serving.engine.kv_cache import block_bytes
from serving.engine.kv_slots import KVSlots
from serving.engine.model import Model
from serving.engine.model_runner import Forward
from serving.engine.ops.native.target import Target
from serving.engine.settings import DtypeName, EngineSettings
from serving.engine.slots import BUCKETS
from tests import tiny
from tests.serving.engine.builds import BUILDS, NAMES, read_compiled
from tests.serving.engine.driving import Folders, base_of, request, stream, until

IN_BFLOAT16 = next(build for build in BUILDS if build[1] == torch.bfloat16)  # the best one
TOKENS = range(60, 92)  # one adapter each
SHORT = (1, 1, 2, 3, 6)  # tokens that requests ask for
LONG = (1, 3, 7, 16, 30)
PIECES = 20  # of the long campaign, each with traffic of its own and under two minutes
SETTINGS = EngineSettings(
    device="cpu",
    dtype="float32",
    max_running=16,
    max_waiting=200,
    max_model_len=64,
    max_batched_tokens=48,
    adapter_slots=4,
    adapter_host_memory=1 << 20,  # a few adapters, so that most loads read files again
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_signature_base(tmp_path_factory.mktemp("signature"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("adapters")
    return Folders({str(t): tiny.make_signature_adapter(folder / str(t), base, t) for t in TOKENS})


def test_ten_thousand_requests_over_four_slots_give_no_wrong_token(
    base: Path, folders: Folders
) -> None:
    churn(base, folders, SETTINGS, requests=10_000, workers=48)


@pytest.mark.parametrize(("dtype", "requests"), [("float32", 1000), ("bfloat16", 300)])
def test_torch_operators_give_no_wrong_token_either(
    base: Path, folders: Folders, dtype: DtypeName, requests: int
) -> None:
    settings = replace(SETTINGS, operators="torch", dtype=dtype)
    churn(base, folders, settings, requests, workers=48)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        pytest.param(*build, marks=[] if build == IN_BFLOAT16 else [pytest.mark.long], id=name)
        for build, name in zip(BUILDS[1:], NAMES[1:], strict=True)
    ],
)
def test_no_other_build_of_the_operators_gives_a_wrong_token(
    base: Path, folders: Folders, target: Target, dtype: torch.dtype
) -> None:
    model = read_compiled(base, target, dtype, 64)
    churn(base, folders, SETTINGS, requests=300, workers=48, model=model)


@pytest.mark.long
@pytest.mark.parametrize("piece", range(PIECES))
def test_a_million_tokens_of_a_hundred_thousand_requests_have_no_wrong_one(
    base: Path, folders: Folders, piece: int
) -> None:
    """Every second piece in bfloat16, with the best operators for each format."""
    requests = 100_000 // PIECES
    settings = replace(SETTINGS, dtype="bfloat16" if piece % 2 else "float32")
    counts = churn(base, folders, settings, requests, workers=96, lengths=LONG, seed=piece)
    assert counts["tokens"] > 1_000_000 // PIECES


def test_memory_for_four_adapters_of_the_highest_rank_gives_no_wrong_token(
    base: Path, folders: Folders
) -> None:
    """Slots of all ranks come and go in one arena, on pages that others have used."""
    parts = assemble(read_model(base_of(base), SETTINGS), folders, SETTINGS)
    parts.core.residency.loader.close()
    pages = 4 * BUCKETS[-1] // BUCKETS[0]
    memory = pages * parts.core.residency.stacks.page_bytes
    settings = replace(SETTINGS, adapter_slots=None, adapter_memory=memory)
    churn(base, folders, settings, requests=1000, workers=48)


def test_memory_for_fewer_sequences_than_run_gives_no_wrong_token(
    base: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences are paused wherever they are, read again and go on; others get their memory."""
    monkeypatch.setattr(core, "SOON", 0)  # they outgrow it more often
    model = read_model(base_of(base), SETTINGS)
    blocks = 20 * block_bytes(model.spec, torch.float32)
    settings = replace(SETTINGS, kv_cache_bytes=blocks, prefix_cache_bytes=0)
    counts = churn(base, folders, settings, requests=1000, workers=48, lengths=LONG, model=model)
    assert counts["paused"] > 20


def test_a_slot_that_keeps_leftovers_gives_wrong_tokens(base: Path, folders: Folders) -> None:
    """The oracle can tell: adding an adapter to a slot instead of overwriting it shows."""
    model = read_model(base_of(base), SETTINGS)
    parts = assemble(model, folders, SETTINGS)
    stacks, fill = parts.core.residency.stacks, parts.core.residency.stacks.load

    def add_up(slot, adapter, *part):  # the shape of LoraStacks.load
        where = slice(slot.row * len(adapter.weights), (slot.row + 1) * len(adapter.weights))
        before = stacks.arena[where].clone()
        written = fill(slot, adapter, *part)
        stacks.arena[where] += before
        return written

    stacks.load = add_up  # type: ignore[method-assign]  # the sabotage this test is about
    wrong = asyncio.run(drive(TorchEngine(parts, SETTINGS), folders, requests=300, workers=16))
    assert wrong["wrong"] > 10


def churn(
    base: Path,
    folders: Folders,
    settings: EngineSettings,
    requests: int,
    workers: int,
    lengths: Sequence[int] = SHORT,
    seed: int = 1,
    model: Forward | None = None,
) -> Counter[str]:
    model = model or read_model(base_of(base), settings)
    before, file_before = weights_digest(model), file_digest(base)
    parts = assemble(model, folders, settings)
    engine = TorchEngine(parts, settings)
    counts = asyncio.run(drive(engine, folders, requests, workers, lengths, seed))
    tiers = parts.core.residency
    assert counts["wrong"] == 0
    assert counts["done"] > requests // 2
    assert counts["aborted"] > requests // 20
    assert tiers.evictions > requests // 200
    assert not parts.core.scheduler.running
    assert not parts.core.scheduler.waiting
    assert all(tiers.table.pins(digest) == 0 for digest in tiers.table.resident())
    assert not tiers.filling
    cache = parts.core.cache
    assert cache.free_blocks == cache.blocks
    if isinstance(cache, KVSlots):
        assert all(not layer.any() for layer in (*cache.keys, *cache.values))
    assert weights_digest(model) == before
    assert file_digest(base) == file_before
    counts["paused"] = parts.core.counters.paused
    return counts


async def drive(
    engine: TorchEngine,
    folders: Folders,
    requests: int,
    workers: int,
    lengths: Sequence[int] = SHORT,
    seed: int = 1,
) -> Counter[str]:
    """Let `workers` clients share `requests` requests; each picks, reads and perhaps leaves."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    left = iter(range(requests))

    async def one(ref: AdapterRef | None, token: int) -> None:
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
        count, stop_at = rng.choice(lengths), rng.random()
        held = rng.random() < 0.1  # whatever it wears, a grammar makes it write something else
        if held:
            token = ord("%")
        grammar = Grammar("regex", "%+") if held else None
        deltas = stream(engine, request(prompt, ref, max_tokens=count, grammar=grammar))
        async for delta in deltas:
            counts["tokens"] += len(delta.token_ids)
            counts["wrong"] += any(t != token for t in delta.token_ids)
            if stop_at < 0.1:
                await deltas.aclose()
                counts["aborted"] += 1
                return
        counts["done"] += 1

    async def client() -> None:
        for _ in left:
            # Popularity as in life: a few adapters are asked for most of the time.
            rank = min(int(rng.paretovariate(0.9)) - 1, len(TOKENS) - 1)
            token = TOKENS[rank] if rng.random() < 0.9 else tiny.SIGNATURE_BASE_TOKEN
            ref = folders.refs.get(str(token))
            parallel = 4 if rng.random() < 0.02 else 1  # as for n > 1
            try:
                async with asyncio.timeout(None if rng.random() < 0.97 else rng.random() * 0.05):
                    await asyncio.gather(*(one(ref, token) for _ in range(parallel)))
            except TimeoutError:
                counts["aborted"] += 1

    await asyncio.gather(*(client() for _ in range(workers)))
    await until(engine, lambda stats: not stats.running and not stats.waiting)
    await engine.aclose()
    return counts


def weights_digest(model: Forward) -> str:
    digest = hashlib.sha256()
    for tensor in tensors_of(model):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_of(model: Forward) -> Iterator[torch.Tensor]:
    # TritonModel has them as Model has.
    weights = model if isinstance(model, CompiledModel) else cast("Model", model).weights
    if weights.embedding is not None:
        yield weights.embedding
    yield from (weights.norm, weights.head.dense())
    for layer in weights.layers:
        yield from (layer.attention_norm, layer.mlp_norm)
        yield from (linear.dense() for linear in layer.linears.values())


def file_digest(base: Path) -> str:
    return hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
