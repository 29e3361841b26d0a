"""The Triton operators held to what the compiled ones are: every rank, and other people's pages."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from serving.engine import core
from serving.engine.build import assemble
from serving.engine.engine import TorchEngine
from serving.engine.kv_cache import block_bytes
from serving.engine.settings import EngineSettings
from serving.engine.slots import BUCKETS
from tests import tiny
from tests.serving.engine import test_churn
from tests.serving.engine.driving import Folders, Oracle, Result, complete_all, mixed_requests
from tests.serving.engine.kernels import on_every_device, read_triton, share_out_to_few
from tests.serving.engine.test_triton_model import SMALL

BOUND = 1e-4
RANKS = (*BUCKETS, 5, 40)
LENGTH = 64


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    share_out_to_few(monkeypatch)


@pytest.mark.long
@on_every_device
def test_all_ranks_in_one_batch_equal_peft_also_when_they_come_back(
    tmp_path: Path, device: torch.device
) -> None:
    """The batch twice over two slots: each rank comes into pages that others have used."""
    base = tiny.make_base(tmp_path / "base", seed=3, hidden=32, **SMALL)
    folders = Folders(
        {
            str(rank): tiny.make_adapter(tmp_path / str(rank), base, rank=rank, seed=rank)
            for rank in RANKS
        }
    )
    names = [*folders.refs, None]
    wanted = mixed_requests(names, folders, random.Random(0), tokens=3)
    settings = replace(
        EngineSettings(),
        device=device.type,
        dtype="float32",
        max_running=10,
        max_batched_tokens=23,
        adapter_slots=2,
        prefix_cache_bytes=0,
    )
    model = read_triton(base, device, LENGTH)

    async def main() -> list[Result]:
        with torch.inference_mode():
            parts = assemble(model, folders, settings)
        engine = TorchEngine(parts, settings)
        twice = [cast("list[Result]", await complete_all(engine, wanted)) for _ in "ab"]
        stats = await engine.stats()
        assert stats.adapter_loads >= 2 * len(RANKS) - 2
        await engine.aclose()
        return twice[0] + twice[1]

    results = asyncio.run(main())
    oracles = {name: Oracle(base, _folder(folders, name)) for name in names}
    others = dict(zip(names, (*names[1:], names[0]), strict=True))
    for name, each, result in zip(names * 2, wanted * 2, results, strict=True):
        assert result.tokens == oracles[name].likeliest(each.prompt_ids, result.tokens), name
        assert oracles[name].largest_error(each.prompt_ids, result) < BOUND, name
        assert oracles[others[name]].largest_error(each.prompt_ids, result) > 10 * BOUND, name


def _folder(folders: Folders, name: str | None) -> Path | None:
    return folders.folders[folders.refs[name].digest] if name else None


@pytest.mark.long
@on_every_device
def test_churn_over_few_slots_and_few_pages_gives_no_wrong_token(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With aborts, grammars, several answers to one prompt, and pauses for want of memory."""
    monkeypatch.setattr(core, "SOON", 0)
    base = tiny.make_signature_base(tmp_path / "base")
    folders = Folders(
        {
            str(token): tiny.make_signature_adapter(tmp_path / str(token), base, token)
            for token in test_churn.TOKENS
        }
    )
    model = read_triton(base, device, LENGTH)
    settings = replace(
        test_churn.SETTINGS,
        device=device.type,
        max_running=8,
        kv_cache_bytes=10 * block_bytes(model.spec, torch.float32),
        prefix_cache_bytes=0,
    )
    counts = test_churn.churn(
        *(base, folders, settings),
        requests=40,
        workers=16,
        lengths=test_churn.LONG[:-1],
        model=model,
    )
    assert counts["paused"] > 3
