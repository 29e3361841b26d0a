"""Choosing tokens: support sets, distributions, penalties, seeds."""

import math
from collections import Counter
from pathlib import Path
from typing import Protocol

import pytest
import torch

from registry.home import default_cache
from serving.engine.boundary import GenerateRequest, RequestFailed, SamplingParams
from serving.engine.engine import TorchEngine
from serving.engine.ops.native.library import load_library
from serving.engine.ops.native.target import runnable_targets
from serving.engine.ops.sampling import Shape, greedy, sample
from serving.engine.sampler import Sampled, Sampler
from serving.engine.sequence import Draws, Sequence
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, base_of, request, run_all

VOCAB = 500
DRAWS = 4000


class Drawn(Protocol):
    def __call__(
        self, scores: torch.Tensor, count: int = DRAWS, **params: float
    ) -> torch.Tensor: ...


@pytest.fixture(
    params=[None, *runnable_targets(torch.float32)],
    ids=lambda target: target.name if target else "torch",
)
def drawn(request: pytest.FixtureRequest) -> Drawn:
    """Draws `count` tokens from one row of scores, with evenly spread random numbers."""
    body = sample
    if request.param:
        body = load_library(torch.float32, default_cache() / "operators", request.param).sample

    def draw(scores: torch.Tensor, count: int = DRAWS, **params: float) -> torch.Tensor:
        def column(name: str, default: float) -> torch.Tensor:
            return torch.full((count,), params.get(name, default), dtype=torch.float64)

        shape = Shape(
            temperature=column("temperature", 1.0),
            top_k=column("top_k", 0).long(),
            top_p=column("top_p", 1.0),
            min_p=column("min_p", 0.0),
            uniform=(torch.arange(count, dtype=torch.float64) + 0.5) / count,
        )
        return body(scores.expand(count, -1), shape)

    return draw


def scores_of(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_evenly_spread_numbers_give_each_token_its_share(drawn: Drawn, temperature: float) -> None:
    scores = scores_of(1)
    probs = torch.softmax(scores.double() / temperature, dim=-1)
    counts = torch.bincount(drawn(scores, temperature=temperature), minlength=VOCAB)
    # Inverting the distribution at evenly spread points is off by less than one draw a boundary.
    assert (counts - probs * DRAWS).abs().max() <= 1.0


@pytest.mark.parametrize("top_k", [1, 2, 7, 63, 64, 65, 200, VOCAB, 10_000])
def test_top_k_keeps_exactly_the_k_most_likely(drawn: Drawn, top_k: int) -> None:
    scores = torch.linspace(0, 3, VOCAB)[torch.randperm(VOCAB)]
    support = set(drawn(scores, count=20 * VOCAB, top_k=top_k).tolist())
    assert support == set(scores.topk(min(top_k, VOCAB)).indices.tolist())


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_top_p_keeps_exactly_the_smallest_set_that_holds_the_mass(
    drawn: Drawn, top_p: float, scale: float
) -> None:
    """With scale 0 the distribution is nearly flat: the set is far larger than the first look."""
    scores = torch.linspace(0, scale + 0.01, VOCAB)
    probs = torch.softmax(scores.double(), dim=-1)
    order = probs.argsort(descending=True).tolist()
    kept, mass = [order[0]], float(probs[order[0]])
    for token in order[1:]:
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(probs[token])
    assert set(drawn(scores, count=40 * VOCAB, top_p=top_p).tolist()) == set(kept)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_keeps_exactly_what_is_likely_enough(drawn: Drawn, min_p: float) -> None:
    scores = torch.linspace(0, 6, VOCAB)
    probs = torch.softmax(scores.double(), dim=-1)
    kept = set((probs >= min_p * probs.max()).nonzero()[:, 0].tolist())
    assert set(drawn(scores, count=40 * VOCAB, min_p=min_p).tolist()) == kept


def test_top_p_is_taken_of_what_top_k_left(drawn: Drawn) -> None:
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]).log()
    scores[4] = -torch.inf
    assert set(drawn(scores, top_k=2, top_p=0.5).tolist()) == {0}  # 4/7 of the two is enough
    assert set(drawn(scores, top_k=2, top_p=0.6).tolist()) == {0, 1}


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (300, 1.0), (300, 0.8), (40, 0.5)])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_what_is_kept_is_drawn_by_its_share_the_likeliest_first(
    drawn: Drawn, top_k: int, top_p: float, scale: float
) -> None:
    scores = scores_of(4) / 3 * scale
    probs = torch.softmax(scores.double(), dim=-1)
    order = sorted(range(VOCAB), key=lambda token: -float(probs[token]))
    order = order[: top_k or VOCAB]
    whole, kept, mass = float(probs[order].sum()) if top_k else 1.0, list[int](), 0.0
    for token in order:
        if kept and mass >= top_p * whole:
            break
        kept.append(token)
        mass += float(probs[token])
    tokens = drawn(scores, top_k=top_k, top_p=top_p)
    shares = torch.zeros(VOCAB, dtype=torch.float64)
    shares[kept] = probs[kept] / mass
    counts = torch.bincount(tokens, minlength=VOCAB)
    assert (counts - shares * DRAWS).abs().max() <= 1.0
    places = torch.tensor([kept.index(token) for token in tokens.tolist()])
    assert (places.diff() >= 0).all(), "larger numbers draw less likely tokens"


def test_tokens_without_probability_are_never_drawn(drawn: Drawn) -> None:
    scores = torch.full((VOCAB,), -torch.inf)
    scores[[3, 400]] = 0.0
    for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.99)):
        assert set(drawn(scores, top_k=top_k, top_p=top_p).tolist()) == {3, 400}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow(drawn: Drawn) -> None:
    scores = scores_of(2)
    assert set(drawn(scores, count=50, temperature=1e-30).tolist()) == {int(scores.argmax())}


def test_a_request_s_own_numbers_follow_its_distribution() -> None:
    """Chi-squared of 4,000 seeds over ten tokens; its 99.99 % quantile at 9 degrees is 33.7."""
    probs = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    sampler = Sampler(greedy, frozenset())
    sequences = [sequence(temperature=1.0, seed=seed) for seed in range(DRAWS)]
    outcomes = sampler.choose(probs.log().expand(DRAWS, -1), sequences)
    counts = Counter(o.token_id for o in outcomes if isinstance(o, Sampled))
    chi = sum((counts[i] - p * DRAWS) ** 2 / (p * DRAWS) for i, p in enumerate(probs.tolist()))
    assert chi < 33.7


def test_seeds_of_any_sign_differ_and_a_number_can_be_asked_for_again() -> None:
    firsts = {Draws(seed)[0] for seed in (0, 1, -1, 2**63, -(2**63) + 5)}
    assert len(firsts) == 5
    draws = Draws(9)  # a repeated step asks again
    assert draws[0] == draws[0]
    assert Draws(9)[0] == Draws(9)[0]
    assert Draws(None)[0] != Draws(None)[0]


def sequence(prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **params: object):
    made = Sequence(GenerateRequest("r", prompt, SamplingParams(**params)))  # type: ignore[arg-type]  # passed through
    made.tokens += output
    return made


def reference(logits: list[float], prompt: list[int], output: list[int], p: SamplingParams) -> int:
    """Penalties one token at a time, as OpenAI and the CTRL paper define them."""
    best, best_score = -1, -math.inf
    for token, score in enumerate(logits):
        if token in prompt or token in output:
            score = score / p.repetition_penalty if score > 0 else score * p.repetition_penalty
        times = output.count(token)
        score -= p.frequency_penalty * times + (p.presence_penalty if times else 0)
        if score > best_score:
            best, best_score = token, score
    return best


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": -2.0, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    ],
)
def test_penalties_equal_a_straightforward_reference(penalties: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(4)
    sampler = Sampler(greedy, frozenset())
    sequences, logits = [], torch.randn(200, 12, generator=generator)
    for _ in range(200):
        tokens = torch.randint(12, (9,), generator=generator).tolist()
        sequences.append(sequence(tuple(tokens[:4]), tuple(tokens[4:]), temperature=0, **penalties))
    outcomes = sampler.choose(logits.clone(), sequences)
    changed = 0
    for row, made, outcome in zip(logits, sequences, outcomes, strict=True):
        assert isinstance(outcome, Sampled)
        prompt, output = made.tokens[:4], made.tokens[4:]
        assert outcome.token_id == reference(row.tolist(), prompt, output, made.sampling)
        changed += outcome.token_id != int(row.argmax())
    assert changed > 10


def test_penalties_of_one_row_touch_no_other_row_and_not_the_logprobs() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(2, 1)
    plain = sequence(temperature=0, logprobs=1)
    bent = sequence(output=(1,), temperature=0, presence_penalty=5.0, logprobs=1)
    one, two = Sampler(greedy, frozenset()).choose(logits, [plain, bent])
    assert isinstance(one, Sampled)
    assert isinstance(two, Sampled)
    assert (one.token_id, two.token_id) == (1, 2)
    table = torch.log_softmax(logits[0], -1)
    assert two.logprob is not None
    assert two.logprob.logprob == pytest.approx(float(table[2]))
    assert two.logprob.top[0] == (1, pytest.approx(float(table[1])))


def test_a_row_that_is_not_finite_fails_alone_whatever_its_neighbours_ask_for() -> None:
    logits = torch.zeros(5, 8)
    logits[:, 3] = 1.0
    logits[1, 0] = torch.nan
    logits[3, 7] = torch.inf
    sequences = [sequence(temperature=t, seed=1, logprobs=2) for t in (0, 0, 1, 1, 1)]
    outcomes = Sampler(greedy, frozenset()).choose(logits, sequences)
    assert [isinstance(o, RequestFailed) for o in outcomes] == [False, True, False, True, False]


def test_no_end_of_text_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 8.0, 5.0]])
    sampler = Sampler(greedy, frozenset({1, 2}))
    for output, params, wanted in (
        ((), {"min_tokens": 2}, 3),
        ((0,), {"min_tokens": 2}, 3),
        ((0, 0), {"min_tokens": 2}, 1),
        ((), {}, 1),
        ((), {"min_tokens": 2, "ignore_eos": True}, 1),
    ):
        [outcome] = sampler.choose(logits, [sequence((1,), output, temperature=0, **params)])
        assert isinstance(outcome, Sampled)
        assert outcome.token_id == wanted


def test_seeded_answers_do_not_depend_on_who_else_is_in_the_batch(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = EngineSettings(device="cpu", dtype="float32", max_running=8, max_model_len=128)
    shapes = [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"frequency_penalty": 0.5}]
    seeded = [
        request([i, i + 3], tiny_folders.refs["a"], max_tokens=16, temperature=0.9, seed=i, **shape)
        for i, shape in enumerate(shapes)
    ]
    crowd = [request([50 + i] * i, None, max_tokens=3 * i, temperature=1.5) for i in range(1, 9)]
    alone = [
        run_all(TorchEngine.create(base_of(tiny_base), tiny_folders, settings), [each])[0]
        for each in seeded
    ]
    engine = TorchEngine.create(base_of(tiny_base), tiny_folders, settings)
    mixed = run_all(engine, [*crowd[:4], *seeded, *crowd[4:]])
    assert mixed[4:8] == alone


def test_text_ends_at_any_end_of_text_token_and_does_not_show_it(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = EngineSettings(device="cpu", dtype="float32", max_model_len=400)
    wanted = [
        request([i], max_tokens=380, temperature=3.0, seed=i, ignore_eos=ignore)
        for i in range(6)
        for ignore in (False, True)
    ]
    engine = TorchEngine.create(base_of(tiny_base), tiny_folders, settings)
    results = run_all(engine, wanted)
    stopped = [r for r in results[::2] if r.finish == "stop"]
    assert stopped
    for result in stopped:
        assert 257 not in result.tokens
        assert result.completion_tokens == len(result.tokens) + 1
    assert all(r.finish == "length" and len(r.tokens) == 380 for r in results[1::2])
    assert any(257 in r.tokens for r in results[1::2])
