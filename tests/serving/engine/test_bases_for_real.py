"""A published base that transformers computes, where one is on this machine."""

import random
from pathlib import Path

import pytest

from registry.base import BaseModel, Bases
from registry.errors import BaseNotFound
from registry.home import default_cache
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.serving.engine.driving import Folders, Oracle, request, run_all

GEMMAS = ("google/gemma-3-270m-it", "google/gemma-3-270m")


def find_gemma() -> BaseModel:
    bases = Bases(default_cache() / "bases")
    for name in GEMMAS:
        try:
            return bases.get(name)
        except BaseNotFound:
            pass
    pytest.skip(f"needs a base: wardrobe base pull {GEMMAS[0]}")


@pytest.mark.long
def test_gemma_3_270m_in_a_mixed_batch_equals_peft_one_request_at_a_time(tmp_path: Path) -> None:
    """Prompts reach beyond the window of its sliding layers, which is 512 tokens."""
    base, rng = find_gemma(), random.Random(0)
    adapters = {
        name: tiny.make_adapter(tmp_path / name, base.path, rank=rank, seed=rank, strength=0.1)
        for name, rank in (("a", 8), ("b", 16))
    }
    folders = Folders(adapters)
    wanted = [
        request(
            [2, *(rng.randrange(1000, 200_000) for _ in range(length))],
            folders.refs[name] if name else None,
            max_tokens=12,
            logprobs=5,
        )
        for name, length in (("a", 600), (None, 30), ("b", 700), (None, 550), ("a", 5))
    ]
    settings = EngineSettings(device="cpu", dtype="float32", max_model_len=1024, max_running=8)
    results = run_all(TorchEngine.create(base, folders, settings), wanted)
    for name, own in (("a", (0, 4)), ("b", (2,)), (None, (1, 3))):
        oracle = Oracle(base.path, adapters.get(name or ""))
        for index in own:
            # Logits are sums over 640 numbers of some hundreds: 1e-3 is the noise of float32.
            assert oracle.largest_error(wanted[index].prompt_ids, results[index]) < 1e-3
