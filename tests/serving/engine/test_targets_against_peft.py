"""Every build of the operators: a mixed batch of all ranks computes what PEFT computes."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch

from serving.engine.boundary import GenerateRequest
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.model_runner import Forward
from serving.engine.ops.native.target import Target
from serving.engine.settings import EngineSettings
from serving.engine.slots import BUCKETS
from tests import tiny
from tests.serving.engine.builds import BUILDS, NAMES, read_compiled
from tests.serving.engine.driving import (
    Folders,
    Oracle,
    Result,
    base_of,
    complete_all,
    mixed_requests,
    run_all,
)

BOUND = 1e-4  # of a log-probability, in float32
LENGTH = 12
RANKS = (*BUCKETS, 5, 40)
# Chunks of prompts beside rows that decode. Every step of a prompt is computed.
SETTINGS = EngineSettings(
    device="cpu", max_model_len=64, max_running=18, max_batched_tokens=23, prefix_cache_bytes=0
)
every_build = pytest.mark.parametrize(("target", "dtype"), BUILDS, ids=NAMES)


@dataclass(frozen=True)
class Mixed:
    """A base, adapters of every bucket, and two requests for each of them and for the base."""

    base: Path
    folders: Folders
    names: Sequence[str | None]
    wanted: Sequence[GenerateRequest]
    exact: Mapping[str | None, Oracle]  # by the name of what it wears

    def run(self, model: Forward) -> list[Result]:
        return run_all(TorchEngine(assemble(model, self.folders, SETTINGS), SETTINGS), self.wanted)

    def folder(self, name: str | None) -> Path | None:
        return self.folders.folders[self.folders.refs[name].digest] if name else None


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Heads of 32 numbers: AMX multiplies queries with keys then."""
    folder, rng = tmp_path_factory.mktemp("mixed"), random.Random(0)
    base = tiny.make_base(folder / "base", seed=3, head_dim=32)
    folders = Folders(
        {
            str(rank): tiny.make_adapter(folder / str(rank), base, rank=rank, seed=rank)
            for rank in RANKS
        }
    )
    names = [*folders.refs, None] * 2
    wanted = mixed_requests(names, folders, rng, LENGTH)
    oracles = {None: Oracle(base)} | {
        name: Oracle(base, folders.folders[ref.digest]) for name, ref in folders.refs.items()
    }
    return Mixed(base, folders, names, wanted, oracles)


def check(mixed: Mixed, results: Sequence[Result], bound: float) -> None:
    """Hold every row to PEFT, and the oracle to what it would say of another adapter or none."""
    far = max(10 * bound, 100 * BOUND)
    others = dict(zip(mixed.exact, (*list(mixed.exact)[1:], None), strict=True))
    for name, each, result in zip(mixed.names, mixed.wanted, results, strict=True):
        assert len(result.logprobs) == LENGTH
        assert mixed.exact[name].largest_error(each.prompt_ids, result) < bound, name
        for wrong in {others[name], None} - {name}:
            assert mixed.exact[wrong].largest_error(each.prompt_ids, result) > far, name


def check_tokens(mixed: Mixed, results: Sequence[Result]) -> None:
    for name, each, result in zip(mixed.names, mixed.wanted, results, strict=True):
        assert result.tokens == mixed.exact[name].likeliest(each.prompt_ids, result.tokens), name


def bound_of_bfloat16(mixed: Mixed, results: Sequence[Result]) -> float:
    """Return half as much again as PEFT itself is wrong by, in bfloat16 over these tokens."""
    rounded = {name: Oracle(mixed.base, mixed.folder(name), torch.bfloat16) for name in mixed.exact}
    rows = zip(mixed.names, mixed.wanted, results, strict=True)
    return 1.5 * max(
        mixed.exact[name].distance(rounded[name], each.prompt_ids, result)
        for name, each, result in rows
    )


@every_build
def test_all_ranks_and_the_base_in_one_batch_equal_peft_one_at_a_time(
    mixed: Mixed, target: Target, dtype: torch.dtype
) -> None:
    """In bfloat16 no greedy token is held to PEFT, whose own are others than in float32."""
    results = mixed.run(read_compiled(mixed.base, target, dtype, 64))
    if dtype == torch.float32:
        check(mixed, results, BOUND)
        check_tokens(mixed, results)
    else:
        check(mixed, results, bound_of_bfloat16(mixed, results))


def test_torch_in_bfloat16_is_as_near_to_peft(mixed: Mixed) -> None:
    settings = replace(SETTINGS, dtype="bfloat16", operators="torch")
    results = mixed.run(read_model(base_of(mixed.base), settings))
    check(mixed, results, bound_of_bfloat16(mixed, results))


@every_build
def test_adapters_that_were_evicted_and_come_back_give_the_same_numbers(
    mixed: Mixed, target: Target, dtype: torch.dtype
) -> None:
    """Two slots, the batch twice: each rank comes into pages that others have used."""
    model = read_compiled(mixed.base, target, dtype, 64)
    wanted = mixed.run(model)
    slots = 2
    settings = replace(SETTINGS, adapter_slots=slots)

    async def main() -> None:
        engine = TorchEngine(assemble(model, mixed.folders, settings), settings)
        for _ in range(2):
            assert cast("list[Result]", await complete_all(engine, mixed.wanted)) == wanted
        stats = await engine.stats()
        assert stats.adapter_loads >= 2 * len(RANKS) - slots
        await engine.aclose()

    asyncio.run(main())
