"""Several versions on the same held-out items: where each stands, and which are told apart."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from training.evaluation.evaluate import Evaluation
from training.evaluation.gate import facts_of, rounded
from training.evaluation.statistics import Difference, holm, paired


@dataclass(frozen=True, slots=True)
class Pair:
    """Two versions on the same items; `difference` is the second less the first."""

    first: str
    second: str
    difference: Difference
    p_holm: float  # corrected for all pairs of the table


@dataclass(frozen=True, slots=True)
class Standings:
    """What was judged, in the order it was named, and every pair of it."""

    metric: str
    evaluations: tuple[Evaluation, ...]
    pairs: tuple[Pair, ...]

    def facts(self) -> dict[str, Any]:
        """Return it as plain JSON: everything but the answers."""
        return {
            "metric": self.metric,
            "versions": {one.name: facts_of(one) for one in self.evaluations},
            "pairs": [
                {"first": pair.first, "second": pair.second, "p_holm": round(pair.p_holm, 6)}
                | rounded(asdict(pair.difference))
                for pair in self.pairs
            ],
        }


def stand(metric: str, evaluations: Sequence[Evaluation]) -> Standings:
    """Compare every pair, the better one second, corrected by Holm for all of them."""
    pairs = [
        sorted(two, key=lambda one: one.score.share.value) for two in combinations(evaluations, 2)
    ]
    differences = [paired(first.values, second.values, first.groups) for first, second in pairs]
    adjusted = holm([difference.p for difference in differences])
    return Standings(
        metric,
        tuple(evaluations),
        tuple(
            Pair(first.name, second.name, difference, p)
            for (first, second), difference, p in zip(pairs, differences, adjusted, strict=True)
        ),
    )
