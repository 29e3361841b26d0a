"""Two answers to one prompt, compared token by token. Numbers only: no text is kept of either."""

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.boundary import TokenLogprob
from serving.experiments.formats import is_json


@dataclass(frozen=True, slots=True)
class Side:
    """One version's answer, as far as it came."""

    token_ids: tuple[int, ...]
    text: str
    stopped: bool  # it ended by itself, not at its bound
    seconds: float | None = None  # from the start to the last token
    logprobs: Sequence[TokenLogprob] = ()  # of the first tokens; may be fewer than there are


@dataclass(frozen=True, slots=True)
class Pair:
    """What is kept of two answers. After a failure of the candidate only the first three mean much.

    Up to the first difference both have read the same, so what the candidate thinks of production's
    tokens there is exact: `logprob` is the sum of its log probabilities (nats) of them, the
    first different one included, over `logprob_tokens`. Where that one is not among the candidate's
    most likely tokens, the least likely of those stands for it, and `logprob_bounded` says so.
    """

    comparison: str
    key: str  # the request's id, or a hash of the replayed prompt
    unit: str  # a hash: who varies independently
    failed: bool = False  # the candidate gave no answer
    same: bool = False  # all tokens are equal, and both ended alike
    prefix: float = 0.0  # share of equal tokens before the first difference, of the longer answer
    equal: float = 0.0  # share of equal tokens at the same place, of the longer answer
    production_tokens: int = 0
    candidate_tokens: int = 0
    production_stopped: bool = False
    candidate_stopped: bool = False
    logprob: float | None = None
    production_logprob: float | None = None  # of the same tokens; where it is known
    logprob_tokens: int = 0
    logprob_bounded: bool = False
    json_expected: bool = False  # JSON was asked for, or production's answer is JSON
    production_json: bool = False
    candidate_json: bool = False
    production_seconds: float | None = None
    candidate_seconds: float | None = None


def compare(
    comparison: str,
    key: str,
    unit: str,
    production: Side,
    candidate: Side,
    *,
    json_asked: bool,
) -> Pair:
    """Compare two answers to the same prompt."""
    a, b = production.token_ids, candidate.token_ids
    longest = max(len(a), len(b))
    places = [x == y for x, y in zip(a, b, strict=False)]
    prefix = places.index(False) if False in places else len(places)
    logprob, tokens, bounded = _of_production(a[: prefix + 1], candidate.logprobs)
    own = [token.logprob for token in production.logprobs[:tokens]]
    production_json = is_structured(production.text)
    return Pair(
        comparison,
        key,
        unit,
        same=a == b and production.stopped == candidate.stopped,
        prefix=prefix / longest if longest else 1.0,
        equal=sum(places) / longest if longest else 1.0,
        production_tokens=len(a),
        candidate_tokens=len(b),
        production_stopped=production.stopped,
        candidate_stopped=candidate.stopped,
        logprob=logprob if tokens else None,
        production_logprob=sum(own) if tokens and len(own) == tokens else None,
        logprob_tokens=tokens,
        logprob_bounded=bounded,
        json_expected=json_asked or production_json,
        production_json=production_json,
        candidate_json=is_structured(candidate.text),
        production_seconds=production.seconds,
        candidate_seconds=candidate.seconds,
    )


def is_structured(text: str) -> bool:
    """Whether a text is a JSON object or array. A bare number or word is no format."""
    return text.lstrip().startswith(("{", "[")) and is_json(text)


def _of_production(
    shared: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> tuple[float, int, bool]:
    """Return (sum of logprobs, tokens, bounded) of production's tokens under the candidate.

    `shared` ends with the first token that differs, if one does.
    """
    total, bounded = 0.0, False
    pairs = list(zip(shared, logprobs, strict=False))
    for token, said in pairs:
        known = {said.token_id: said.logprob, **dict(said.top)}
        if token not in known:
            bounded = True
        total += known.get(token, min(known.values()))
    return total, len(pairs), bounded
