"""A mixed batch computes what PEFT computes one request at a time."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from serving.engine.boundary import GenerateRequest
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.serving.engine.driving import Folders, Oracle, Result, base_of, request, run_all

BOUND = 1e-4
LENGTH = 12
BODIES: list[OperatorsName] = ["auto", "torch"]
every_body = pytest.mark.parametrize("operators", BODIES)
SETTINGS = EngineSettings(device="cpu", dtype="float32", max_model_len=256)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("base"), seed=3)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight adapters that differ in everything that PEFT lets differ."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(name: str, **options: object) -> Path:
        return tiny.make_adapter(folder / name, base, seed=hash_of(name), **options)  # type: ignore[arg-type]  # passed through

    return {
        "all4": make("all4", rank=4),
        "attention8": make("attention8", rank=8, targets=tiny.ATTENTION),
        "mlp16": make("mlp16", rank=16, targets=tiny.MLP, alpha=7.5),
        "rs32": make("rs32", rank=32, use_rslora=True, alpha=8),
        "qv64": make("qv64", rank=64, targets=("q_proj", "v_proj")),
        "patterns": make(
            "patterns",
            rank=8,
            rank_pattern={"q_proj": 24, "layers.1.mlp.down_proj": 3},
            alpha_pattern={"k_proj": 40, "o_proj": 4},
        ),
        "rspatterns": make(
            "rspatterns",
            rank=12,
            use_rslora=True,
            rank_pattern={"up_proj": 5, "v_proj": 33},
            alpha_pattern={"up_proj": 9},
        ),
        "down5": make("down5", rank=5, targets=("down_proj",), strength=1.0),
    }


def hash_of(name: str) -> int:
    return sum(name.encode())


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def mixed(
    base: Path, adapters: dict[str, Path], settings: EngineSettings
) -> tuple[list[str | None], list[GenerateRequest], list[Result]]:
    """Run every adapter and the base, each twice with other prompts, in one batch."""
    folders = Folders(adapters)
    names: list[str | None] = [*adapters, None, *adapters, None]
    wanted = [
        request(prompt, folders.refs[name] if name else None, max_tokens=LENGTH, logprobs=5)
        for name, prompt in zip(names, prompts(len(names)), strict=True)
    ]
    engine = TorchEngine.create(base_of(base), folders, settings)
    return names, wanted, run_all(engine, wanted)


def check(
    base: Path,
    adapters: dict[str, Path],
    names: Sequence[str | None],
    wanted: Sequence[GenerateRequest],
    results: Sequence[Result],
) -> None:
    for name in set(names):
        oracle = Oracle(base, adapters[name] if name else None)
        for own, each, result in zip(names, wanted, results, strict=True):
            if own == name:
                assert result.tokens == oracle.greedy(each.prompt_ids, LENGTH), name
                assert len(result.logprobs) == LENGTH
                assert oracle.largest_error(each.prompt_ids, result) < BOUND, name


@every_body
def test_eight_different_adapters_and_the_base_in_one_batch_equal_peft_one_at_a_time(
    base: Path, adapters: dict[str, Path], operators: OperatorsName
) -> None:
    names, wanted, results = mixed(base, adapters, replace(SETTINGS, operators=operators))
    check(base, adapters, names, wanted, results)


@pytest.mark.gpu
@every_body
@pytest.mark.parametrize("slots", [None, 2])
def test_a_gpu_equals_peft_one_at_a_time(
    base: Path, adapters: dict[str, Path], operators: OperatorsName, slots: int | None
) -> None:
    settings = replace(SETTINGS, device="cuda", operators=operators, adapter_slots=slots)
    names, wanted, results = mixed(base, adapters, settings)
    check(base, adapters, names, wanted, results)


def test_the_wrong_adapter_and_no_adapter_at_all_exceed_the_bound(
    base: Path, adapters: dict[str, Path]
) -> None:
    """The oracle can tell: otherwise the test above would pass for an engine that ignores LoRA."""
    names, wanted, results = mixed(base, adapters, SETTINGS)
    order = list(adapters)
    for index, name in enumerate(order):
        each, result = wanted[index], results[index]
        assert names[index] == name
        wrong = Oracle(base, adapters[order[index - 1]])
        assert wrong.largest_error(each.prompt_ids, result) > 100 * BOUND, name
        assert Oracle(base).largest_error(each.prompt_ids, result) > 100 * BOUND, name


@every_body
@pytest.mark.parametrize("batched", [20, 23, 64])
def test_prompts_read_in_chunks_give_what_whole_prompts_give(
    base: Path, adapters: dict[str, Path], batched: int, operators: OperatorsName
) -> None:
    settings = EngineSettings(
        device="cpu",
        dtype="float32",
        max_model_len=256,
        max_running=18,
        max_batched_tokens=batched,
        operators=operators,
    )
    names, wanted, results = mixed(base, adapters, settings)
    check(base, adapters, names, wanted, results)


@every_body
def test_few_slots_give_what_many_slots_give(
    base: Path, adapters: dict[str, Path], operators: OperatorsName
) -> None:
    """Adapters are evicted and loaded again, into slots that others have used."""
    settings = replace(SETTINGS, adapter_slots=2, operators=operators)
    names, wanted, results = mixed(base, adapters, settings)
    check(base, adapters, names, wanted, results)


def test_a_request_gets_the_same_numbers_alone_and_in_any_batch(
    base: Path, adapters: dict[str, Path]
) -> None:
    """The compiled pass adds up in an order that the row alone decides: equal to the last bit."""
    chunked = replace(SETTINGS, max_running=18, max_batched_tokens=23)
    _, wanted, together = mixed(base, adapters, SETTINGS)
    assert mixed(base, adapters, chunked)[2] == together
    folders = Folders(adapters)
    for each, result in list(zip(wanted, together, strict=True))[:3]:
        engine = TorchEngine.create(base_of(base), folders, SETTINGS)
        assert run_all(engine, [each]) == [result]
