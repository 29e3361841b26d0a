"""How sure a measured value is, and a difference between two on the same items.

Items of one group (paraphrases, one document) fail together, so where groups repeat the group is
what counts: E. Miller, Adding Error Bars to Evals, arXiv 2411.00640. A group of one is the item.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from training.evaluation.resample import bootstrap, group_sums, sign_flips

LEVEL = 0.05  # two are told apart below it
NO_SPREAD = 1e-9  # equal but for rounding
SEED = 0  # of every resample: the same answers, the same interval
Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Interval:
    """A share of successes, or a mean of values between 0 and 1, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Loss:
    """A mean over tokens, in nats, with its 95 % bootstrap interval over groups."""

    value: float
    low: float
    high: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Difference:
    """Second minus first on the same items, with its 95 % interval and the p-value of no effect."""

    value: float
    low: float
    high: float
    p: float
    test: str
    wins: int  # items where the second is better
    losses: int


def wilson(successes: float, trials: float) -> Interval:
    """Return the Wilson score interval of a share, without continuity correction.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927. It
    stays inside 0 and 1 and holds its level at small counts, where the normal one does not.
    """
    if not 0 <= successes <= trials or trials <= 0:
        raise ValueError(f"{successes} successes of {trials} trials is no share.")
    share = successes / trials
    z2 = Z_95 * Z_95
    centre = share + z2 / (2 * trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding would leave a hair beside the exact ends.
    return Interval(share, 0.0 if successes == 0 else low, 1.0 if successes == trials else high)


def share_of(right: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """Return the share of right answers with Wilson's interval, at the effective number of items.

    Where groups repeat, n becomes p(1 − p) / variance with Miller's clustered variance, and shrinks
    further by (z/t)² for few groups (E. Korn and B. Graubard, Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data, 1998). It is never
    above the number of items, and is the number of groups where no variance can be seen.
    """
    items, count = len(right), len(set(groups))
    if count == items or items == 0:
        return wilson(sum(right), items)
    share = sum(right) / items
    effective = float(count)
    if 0 < share < 1 and count > 1:
        error = clustered_error([float(value) for value in right], groups)
        shrink = (Z_95 / float(stdtrit(count - 1, 0.975))) ** 2
        effective = share * (1 - share) / error**2 * shrink if error else count
    effective = min(effective, items)
    return wilson(share * effective, effective)


def clustered_error(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Return the standard error of the mean when values of one group may go together.

    The square root of G/(G − 1) · Σ_groups (Σ_items (v − mean))² / n²: Miller's equation with the
    correction for G groups. With groups of one it is the usual s / √n.
    """
    away = np.asarray(values, dtype=np.float64) - float(np.mean(values))
    sums = group_sums(away[:, None], groups)[:, 0]
    return math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(away)


def mean_of(values: Sequence[float], groups: Sequence[Hashable]) -> Interval:
    """Return the mean of values between 0 and 1 with a bootstrap interval over groups."""
    return folded(np.column_stack([values, np.ones(len(values))]), groups, _mean)


def folded(
    columns: NDArray[np.float64],
    groups: Sequence[Hashable],
    fold: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> Interval:
    """Return a metric between 0 and 1 that is `fold` of the columns' sums over all items.

    `columns` is [items, k]; see `training.evaluation.resample`. Groups that show no spread leave
    Wilson's interval at their number, the widest of its kind; one group leaves 0 to 1.
    """
    value, count = float(fold(columns.sum(axis=0))), len(set(groups))
    if count < 2:
        return Interval(value, 0.0, 1.0)
    low, high = bootstrap(columns, groups, fold, SEED)
    if high - low < NO_SPREAD:
        widest = wilson(value * count, count)
        low, high = widest.low, widest.high
    return Interval(value, low, high)


def mean_loss(sums: Sequence[tuple[float, int]], groups: Sequence[Hashable]) -> Loss:
    """Return the mean over the tokens of all (nats, tokens) pairs.

    Raises ValueError for a single group: nothing says how far another one would be.
    """
    columns = np.array(sums, dtype=np.float64)
    low, high = bootstrap(columns, groups, _mean, SEED)
    nats, tokens = columns.sum(axis=0)
    return Loss(float(nats / tokens), low, high, int(tokens))


def paired(
    first: Sequence[float], second: Sequence[float], groups: Sequence[Hashable]
) -> Difference:
    """Compare two systems on the same items; the values of each are between 0 and 1.

    Right or wrong, each item its own group: McNemar's exact test, and the interval of D. Bonett
    and R. Price, Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data, 2012. Otherwise the differences are resampled by group: their signs are flipped
    for p, and a bootstrap gives the interval.
    """
    if not len(first) == len(second) == len(groups) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values in {len(groups)} are no pairs.")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    value = float(differences.mean())
    binary = bool(np.isin([*first, *second], (0.0, 1.0)).all())
    if binary and len(set(groups)) == len(groups):
        low, high = _bonett_price(wins, losses, len(differences))
        return Difference(value, low, high, mcnemar(wins, losses), "exact McNemar", wins, losses)
    low, high = _of_differences(differences, groups)
    p = sign_flips(differences, groups, SEED)
    return Difference(value, low, high, p, "sign flips by group", wins, losses)


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: a sign test over discordant items.

    Q. McNemar, Note on the sampling error of the difference between correlated proportions, 1947;
    exact by the binomial distribution at one half. 1 where no item is discordant.
    """
    discordant = wins + losses
    tail = sum(math.comb(discordant, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for that many tests, in their order.

    S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979: the k-th smallest of m
    is multiplied by m − k + 1, and never falls below a smaller one's.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 0] / sums[..., 1]


def _of_differences(
    differences: NDArray[np.float64], groups: Sequence[Hashable]
) -> tuple[float, float]:
    """Bootstrap by group; where all differences are the same, as if each group were one pair."""
    count = len(set(groups))
    if count < 2:
        return -1.0, 1.0
    columns = np.column_stack([differences, np.ones(len(differences))])
    low, high = bootstrap(columns, groups, _mean, SEED)
    if high - low < NO_SPREAD:
        size = abs(low) or 1.0
        low, high = _bonett_price(count if low > 0 else 0, count if low < 0 else 0, count)
        return low * size, high * size
    return low, high


def _bonett_price(wins: int, losses: int, items: int) -> tuple[float, float]:
    """(p₁ − p₂) ± z·√((p₁ + p₂ − (p₁ − p₂)²) / (n + 2)), one win and one loss added."""
    up, down = (wins + 1) / (items + 2), (losses + 1) / (items + 2)
    reach = Z_95 * math.sqrt((up + down - (up - down) ** 2) / (items + 2))
    return max(-1.0, up - down - reach), min(1.0, up - down + reach)
