"""Resampling by group, seeded: the bootstrap, and the test that flips signs.

A metric is a function of sums over items (a mean is Σ value / Σ 1, a micro F1 is 2 Σ right /
(Σ said + Σ true)), so a resample only has to weight the groups' sums: no item is looked at again.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

Array = NDArray[np.float64]

RESAMPLES = 10_000
EXACT_GROUPS = 13  # up to 2^13 sign patterns all are tried; beyond, RESAMPLES of them are drawn
BATCH = 1000  # resamples at once: bounds the memory


def group_sums(columns: Array, groups: Sequence[Hashable]) -> Array:
    """Add up rows [items, k] by group; return [groups, k] in the order the groups first appear."""
    places: dict[Hashable, int] = {}
    of_item = [places.setdefault(group, len(places)) for group in groups]
    sums = np.zeros((len(places), columns.shape[1]))
    np.add.at(sums, of_item, columns)
    return sums


def bootstrap(
    columns: Array, groups: Sequence[Hashable], fold: Callable[[Array], Array], seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `fold` (sums [..., k] → values [...]), by group.

    The percentiles are the expanded ones of T. Hesterberg, What Teachers Should Know About the
    Bootstrap, 2015: Φ(−√(n/(n−1)) · t), without which few groups give too narrow an interval.
    The ends are equal where the groups show no spread. Raises ValueError for fewer than two.
    """
    sums = group_sums(columns, groups)
    count = len(sums)
    if count < 2:
        raise ValueError("An interval needs at least two groups.")
    generator = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    values = np.concatenate(
        [fold(generator.multinomial(count, even, BATCH) @ sums) for _ in range(RESAMPLES // BATCH)]
    )
    tail = float(ndtr(-math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.975)))
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def sign_flips(differences: Array, groups: Sequence[Hashable], seed: int) -> float:
    """Return the two-sided p-value of "either system could have given either value".

    Under it the sign of a whole group's difference is a fair coin. R. Fisher, The Design of
    Experiments, 1935. For right and wrong answers in groups of one it is McNemar's exact test.
    """
    sums = group_sums(differences[:, None], groups)[:, 0]
    sums = sums[sums != 0]
    reached = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal but for rounding
    if len(sums) <= EXACT_GROUPS:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ sums) >= reached))
    generator = np.random.default_rng(seed)
    found = 0
    for _ in range(RESAMPLES // BATCH):
        signs = 2 * generator.integers(0, 2, (BATCH, len(sums)), dtype=np.int8) - 1
        found += int(np.sum(np.abs(signs @ sums) >= reached))
    return (found + 1) / (RESAMPLES + 1)  # the pattern seen counts as one of them
