"""Which token the sampler takes where biases and grammars change the scores."""

from typing import Any

import numpy as np
import pytest
import torch

from serving.engine.boundary import RequestFailed
from serving.engine.grammar import Allowed, GrammarFailed
from serving.engine.ops.sampling import greedy
from serving.engine.sampler import Sampled, Sampler
from serving.engine.sequence import Sequence as Request
from tests.serving.engine.driving import request


def choose(row: list[float], **params: Any) -> int:
    made = Request(request([1], **params))
    [outcome] = Sampler(greedy, frozenset({3})).choose(torch.tensor([row]), [made])
    assert isinstance(outcome, Sampled)
    return outcome.token_id


def test_a_bias_is_added_to_its_token_s_score_and_to_no_other() -> None:
    row = [0.0, 3.0, 2.0, -50.0]
    assert choose(row) == 1
    assert choose(row, logit_bias=((2, 0.9),)) == 1
    assert choose(row, logit_bias=((2, 1.1),)) == 2
    assert choose(row, logit_bias=((1, -100.0),)) == 2
    assert choose(row, logit_bias=((0, 100.0), (1, 96.0))) == 0
    heat = {"temperature": 2.0, "ignore_eos": False, "min_tokens": 1}
    for seed in range(20):
        # A bias cannot bring back an end that min_tokens forbids.
        assert choose(row, logit_bias=((3, 100.0),), seed=seed, **heat) != 3


class Only:
    """Stands where a constraint does, and allows some tokens or fails."""

    def __init__(self, some: Allowed | None) -> None:
        self.some = some

    def allowed(self) -> Allowed:
        if self.some is None:
            raise GrammarFailed("too much work")
        return self.some


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_rows_get_the_most_likely_token_of_what_is_allowed(dtype: torch.dtype) -> None:
    """Beside free and failing rows; bfloat16 has ties, of which the first counts."""
    rng, vocab = np.random.default_rng(1), 300
    sampler = Sampler(greedy, frozenset())
    failed = 0
    for _ in range(100):
        logits = torch.randn(6, vocab).to(dtype)
        masks = [rng.random(vocab) < share for share in (0.01, 0.3, 0.99, 1.1)]
        masks[0][7] = True  # never nothing
        held = [*map(Only, masks), Only(None), None]
        rows = [
            Request(request([1], logit_bias=bias), each)  # type: ignore[arg-type]  # as good as one
            for each in held
            for bias in [((5, 2.0),) if rng.random() < 0.3 else ()]
        ]
        outcomes = sampler.choose(logits, rows)
        for scores, mask, row, outcome in zip(
            logits, [*masks, None, True], rows, outcomes, strict=True
        ):
            if mask is None:
                assert isinstance(outcome, RequestFailed)
                failed += 1
                continue
            scores = scores.float()
            for token, value in row.sampling.logit_bias:
                scores[token] += value
            scores = scores.masked_fill(~torch.as_tensor(mask), -torch.inf)
            assert isinstance(outcome, Sampled)
            assert outcome.token_id == int(scores.max(0).indices)
    assert failed == 100
