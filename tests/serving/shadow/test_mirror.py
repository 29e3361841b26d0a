"""A mirror over the real engine: production's tokens are those it gives without one."""

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from registry.adapter import AdapterName
from serving.api.sequence import Piece, sequence
from serving.engine.boundary import Engine, GenerateRequest, SamplingParams
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from serving.experiments.experiment import Arm
from serving.routing import Route
from serving.shadow.comparison import Comparison
from serving.shadow.live import Chosen, Live
from serving.shadow.mirror import Mirror
from serving.shadow.pair import Pair
from serving.tokens import Tokens
from tests import tiny
from tests.serving.engine.driving import Folders, base_of

SETTINGS = EngineSettings(
    device="cpu", dtype="float32", max_running=16, max_model_len=128, max_lora_rank=32
)
NAME = AdapterName("acme", "support")


class Found:
    """What a mirror tells: pairs, and what made none."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []
        self.missed: Counter[str] = Counter()

    def take(self, pair: Pair) -> None:
        self.pairs.append(pair)

    def miss(self, comparison: Comparison, why: str) -> None:
        self.missed[why] += 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("mirror") / "base", seed=5)


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("mirror-adapters")
    return Folders(
        {
            "a": tiny.make_adapter(folder / "a", base, rank=4, seed=4),
            "b": tiny.make_adapter(folder / "b", base, rank=8, seed=8),
            "nan": tiny.make_adapter(folder / "nan", base, strength=float("nan")),
            "huge": tiny.make_adapter(
                folder / "huge", base, targets=("gate_proj", "up_proj"), strength=1e25
            ),
            "missing": folder / "missing",
        }
    )


def requests_of(folders: Folders) -> list[GenerateRequest]:
    """Greedy and drawn answers of one adapter and of the base, of many lengths."""
    return [
        GenerateRequest(
            f"req_{number}",
            tuple(b"how do I block my card? "[: 4 + 2 * number]),
            SamplingParams(
                max_tokens=8 + 4 * number,
                temperature=float(number % 2),
                seed=number,
                logprobs=0,
            ),
            folders.refs["a"] if number % 3 else None,
        )
        for number in range(8)
    ]


def chosen(folders: Folders, candidate: str) -> Chosen:
    arms = Arm("control", 0.5, NAME, 1, "a" * 64), Arm("treatment", 0.5, NAME, 2, "b" * 64)
    made = Comparison("shd_1", "shadow", NAME, *arms, 1.0, "", "running", "", "test", "", None)
    adapter = folders.refs[candidate]
    return Chosen(Live(made, Route(adapter.label, adapter.digest, adapter)), "unit")


async def answer_all(
    engine: Engine, tokens: Tokens, asked: list[GenerateRequest], mirrored: Chosen | None
) -> tuple[list[list[Piece]], Found]:
    """Answer all at once, each mirrored if so; wait for the mirrors as well."""
    found = Found()
    mirror = Mirror(found, engine, tokens)  # type: ignore[arg-type]  # all it does with them
    tasks: list[asyncio.Task[None]] = []

    async def one(request: GenerateRequest) -> list[Piece]:
        async def same_prompt(_: Route) -> tuple[int, ...]:
            return request.prompt_ids

        begun = mirrored and await mirror.begin(
            mirrored, request, (), same_prompt, json_asked=False
        )
        pieces: list[Piece] = []
        async with aclosing(sequence(engine, tokens, request, (), 0)) as stream:
            async for piece in stream:
                pieces.append(piece)
                if begun:
                    begun[0].see(piece)
        if begun:
            tasks.append(begun[1])
        return pieces

    answers = await asyncio.gather(*map(one, asked))
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    return list(answers), found


def run(base: Path, folders: Folders, tokens: Tokens, candidate: str | None) -> tuple[list, Found]:
    async def main() -> tuple[list[list[Piece]], Found]:
        engine = TorchEngine.create(base_of(base), folders, SETTINGS)
        try:
            mirrored = chosen(folders, candidate) if candidate else None
            return await answer_all(engine, tokens, requests_of(folders), mirrored)
        finally:
            await engine.aclose()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def alone(base: Path, folders: Folders, tokens: Tokens) -> list[list[Piece]]:
    """Production's answers without a mirror."""
    return run(base, folders, tokens, None)[0]


@pytest.mark.parametrize(
    ("candidate", "failed"), [("b", False), ("nan", True), ("huge", True), ("missing", True)]
)
def test_productions_tokens_are_the_same_with_a_mirror_even_a_poisoned_one(
    base: Path,
    folders: Folders,
    tokens: Tokens,
    alone: list[list[Piece]],
    candidate: str,
    failed: bool,
) -> None:
    answers, found = run(base, folders, tokens, candidate)
    said = [[piece.token_ids for piece in pieces] for pieces in answers]
    assert said == [[piece.token_ids for piece in pieces] for pieces in alone]
    assert len(found.pairs) + found.missed["busy"] == len(answers)
    assert len(found.pairs) >= 1
    assert {pair.failed for pair in found.pairs} == {failed}


def test_a_version_beside_itself_agrees_with_itself_token_by_token(
    base: Path, folders: Folders, tokens: Tokens
) -> None:
    """The same seeds are drawn, and its own log probabilities are those of production."""

    async def main() -> tuple[list[list[Piece]], Found]:
        engine = TorchEngine.create(base_of(base), folders, SETTINGS)
        try:
            mine = [r for r in requests_of(folders) if r.adapter]
            return await answer_all(engine, tokens, mine, chosen(folders, "a"))
        finally:
            await engine.aclose()

    answers, found = asyncio.run(main())
    by_key = {pair.key: pair for pair in found.pairs}
    assert by_key
    for request, pieces in zip(
        [r for r in requests_of(folders) if r.adapter], answers, strict=True
    ):
        if pair := by_key.get(request.request_id):
            own = sum(placed.token.logprob for piece in pieces for placed in piece.logprobs)
            assert (pair.same, pair.prefix, pair.equal) == (True, 1.0, 1.0)
            assert pair.logprob == pytest.approx(own, abs=1e-3)
            assert pair.candidate_seconds is not None


def test_what_is_mirrored_is_given_up_with_production(
    base: Path, folders: Folders, tokens: Tokens
) -> None:
    async def main() -> Counter[str]:
        engine = TorchEngine.create(base_of(base), folders, SETTINGS)
        found = Found()
        mirror = Mirror(found, engine, tokens)  # type: ignore[arg-type]  # as above
        request = replace(
            requests_of(folders)[1], sampling=SamplingParams(max_tokens=100, ignore_eos=True)
        )

        async def same_prompt(_: Route) -> tuple[int, ...]:
            return request.prompt_ids

        begun = await mirror.begin(chosen(folders, "b"), request, (), same_prompt, json_asked=False)
        assert begun is not None
        await asyncio.sleep(0)
        begun[1].cancel()
        await asyncio.gather(begun[1], return_exceptions=True)
        stats = await engine.stats()
        while stats.running + stats.waiting:
            await asyncio.sleep(0.01)
            stats = await engine.stats()
        await engine.aclose()
        return found.missed

    assert asyncio.run(main()) == {"unfinished": 1}
