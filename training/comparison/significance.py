"""How sure a row of the table is, and a difference between two: over items and over runs.

Held-out items are a sample, and so are training seeds. A claim about a *method* must hold for both,
so with several runs the variance has two parts, of items (by group) and of runs: crossed random
effects, with the degrees of freedom of F. Satterthwaite, An Approximate Distribution of Estimates
of Variance Components, 1946. With one run each nothing is known about other seeds, the claim is
about these very runs, and `training.evaluation.statistics` has its tests.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from training.comparison.result import Pair, Row, RunScore
from training.data.examples import Example
from training.evaluation.planning import Z_POWER
from training.evaluation.resample import group_sums
from training.evaluation.statistics import (
    LEVEL,
    Z_95,
    Interval,
    clustered_error,
    holm,
    mean_of,
    paired,
    share_of,
    wilson,
)

Values = NDArray[np.float64]  # [runs, items]
Groups = Sequence[int]  # one for each item


def groups_of(items: Sequence[Example]) -> tuple[int, ...]:
    """Number the groups of the items in the order they first appear."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(item.group, len(numbers)) for item in items)


def interval(runs: Sequence[RunScore], groups: Groups) -> Interval:
    """Return the mean over runs and items with its 95 % interval.

    For several runs it is Wilson's at the effective number of items, p(1 − p) / variance, shrunk by
    (z/t)² for the few degrees of freedom of few runs (Korn and Graubard, 1998).
    """
    values = _values(runs)
    binary = bool(np.isin(values, (0.0, 1.0)).all())
    if len(runs) == 1 and binary:
        return share_of(list(values[0] > 0), groups)
    if len(runs) == 1:
        return mean_of(runs[0].values, groups)
    share = float(values.mean())
    items = clustered_error(list(values.mean(axis=0)), groups) ** 2
    between, freedom = _between_runs([values])
    if share in (0.0, 1.0) or items + between == 0:
        count = len(set(groups))
        return wilson(share * count, count)
    freedom = _freedom([(items, len(set(groups)) - 1), (between, freedom)])
    effective = share * (1 - share) / (items + between) * (Z_95 / _t(freedom)) ** 2
    return wilson(share * effective, effective)


def compare_rows(rows: Sequence[Row], groups: Groups) -> list[Pair]:
    """Return every pair of rows, the better one first, corrected by Holm over all pairs.

    All pairs count, also those that nobody looks at: the best row was picked by the same items, and
    a correction for its own pairs alone would forget that.
    """
    pairs = [compare_pair(a, b, groups) for a, b in combinations(rows, 2)]
    adjusted = holm([pair.p for pair in pairs])
    return [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]


def compare_pair(one: Row, other: Row, groups: Groups) -> Pair:
    """Compare two rows item by item; the better one comes first. `p_holm` is still `p`."""
    first, second = (one, other) if one.value >= other.value else (other, one)
    a, b = _values(first.runs), _values(second.runs)
    difference = a.mean(axis=0) - b.mean(axis=0)
    if len(a) == len(b) == 1:
        found = paired(list(b[0]), list(a[0]), groups)
        low, high, p, test = found.low, found.high, found.p, found.test
    else:
        low, high, p = _over_items_and_runs(a, b, groups)
        test = "Student's t over items and runs"
    return Pair(
        first=first.name,
        second=second.name,
        difference=float(difference.mean()),
        low=low,
        high=high,
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
        p=p,
        p_holm=p,
        items_needed=_items_needed(a, b, groups),
        test=test,
    )


def _over_items_and_runs(a: Values, b: Values, groups: Groups) -> tuple[float, float, float]:
    """Return (low, high, p) of the mean of paired differences.

    Two items are added, half of one on each side as extreme as the most extreme seen: without them
    five wins and no loss would have no variance (A. Agresti and Y. Min, Simple improved confidence
    intervals for comparing matched proportions, 2005).
    """
    difference = a.mean(axis=0) - b.mean(axis=0)
    extreme = float(np.abs(difference).max())
    if extreme == 0:
        return 0.0, 0.0, 1.0
    count = len(difference) + 2
    centre = float(difference.sum()) / count
    sums = group_sums((difference - centre)[:, None], groups)
    clusters = len(sums) + 2
    items = (float((sums**2).sum()) + extreme**2) / count**2 * clusters / (clusters - 1)
    runs, run_freedom = _between_runs([a, b])
    error = math.sqrt(items + runs)
    freedom = _freedom([(items, clusters - 1), (runs, run_freedom)])
    reach = _t(freedom) * error
    p = 2 * float(stdtr(freedom, -abs(centre) / error))
    return max(-1.0, centre - reach), min(1.0, centre + reach), p


def _items_needed(a: Values, b: Values, groups: Groups) -> int | None:
    """Return how many items show this difference at 5 % with 80 % power; None where none would.

    (z + z')² · variance / difference². What varies between runs does not shrink with items, so it
    is taken off what there is to see.
    """
    difference = a.mean(axis=0) - b.mean(axis=0)
    left = float(difference.mean()) ** 2 / (Z_95 + Z_POWER) ** 2 - _between_runs([a, b])[0]
    if left <= 0:
        return None
    variance = len(difference) * clustered_error(list(difference), groups) ** 2
    return max(2, math.ceil(variance / left))


def _between_runs(sides: Sequence[Values]) -> tuple[float, float]:
    """Return what the runs of the sides add to the variance, and its degrees of freedom."""
    parts = [
        (float(side.mean(axis=1).var(ddof=1)) / len(side), len(side) - 1)
        for side in sides
        if len(side) > 1
    ]
    return sum(part for part, _ in parts), _freedom(parts)


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of independent variances: (Σv)² / Σ(v²/f)."""
    total = sum(part for part, _ in parts)
    below = sum(part**2 / freedom for part, freedom in parts if freedom)
    return total**2 / below if below else 1.0


def _t(freedom: float) -> float:
    return float(stdtrit(freedom, 1 - LEVEL / 2))


def _values(runs: Sequence[RunScore]) -> Values:
    return np.array([run.values for run in runs])
