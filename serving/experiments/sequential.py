"""Statistics that stay valid however often they are looked at. Pure functions of sums per arm.

Every test here is an e-process: under its null hypothesis it exceeds 1/α with a probability of at
most α over all looks together (Ville's inequality). So a dashboard may be watched after every
unit, and an interval that is drawn is the stopping rule itself.

- Means and shares: a sequential t with a normal prior N(0, τ²) on the standardised difference, the
  closed form of Gönen, Johnson, Lu and Westfall (2005) as an e-statistic (Pérez-Ortiz, Lardy, de
  Heide and Grünwald, 2024). The variance is the larger of the pooled and Welch's: either alone
  fails at unbalanced splits. That maximum is a safeguard shown by simulation, not by a theorem.
- Ratios of sums within units (answers of a user, tokens of an answer): the delta method of Deng,
  Knoblich and Lu (2018) gives the variance, with the unit as what varies independently.
- Sample ratio mismatch: the Dirichlet-multinomial test of Lindon and Malek (2022).
- Two shares with few units: an exact conditional e-process over a grid of alternatives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

TAU = 0.1  # standard deviation of the standardised effect expected beforehand: effects are small
MIN_UNITS = 100  # of each arm, before a mean is judged; the t form is asymptotic
ROUNDING = 1e-9  # sums of floats differ by less without differing
SRM_STRENGTH = 100.0  # of the Dirichlet prior around the intended split
SRM_ALPHA = 0.001


@dataclass(frozen=True, slots=True)
class Sums:
    """What one metric of one arm adds up to; one term for each unit.

    For a mean per unit, x is 1 for every unit. For a ratio, it is the unit's denominator.
    """

    n: int  # units; of a ratio, those that have a denominator
    y: float = 0.0
    yy: float = 0.0
    x: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    @classmethod
    def of_means(cls, n: int, y: float, yy: float) -> "Sums":
        return cls(n, y, yy, x=n, xx=n, xy=y)

    @property
    def value(self) -> float:
        """Σy / Σx; 0 where nothing was counted yet."""
        return self.y / self.x if self.x else 0.0

    @property
    def spread(self) -> float:
        """The variance of one unit's part in the value; 0 below two units."""
        if self.n < 2 or not self.x:
            return 0.0
        r = self.value
        residual = self.yy - 2 * r * self.xy + r * r * self.xx
        if residual <= ROUNDING * self.yy:
            return 0.0
        return residual / (self.x / self.n) ** 2 / (self.n - 1)


@dataclass(frozen=True, slots=True)
class Difference:
    """A second arm minus the first, with an interval that holds at every look together."""

    value: float
    low: float  # −∞ while there are too few units
    high: float
    log_e: float  # evidence against no difference, natural logarithm

    @property
    def p(self) -> float:
        """An anytime-valid p value of this look."""
        return min(1.0, math.exp(-self.log_e)) if self.log_e > 0 else 1.0

    @property
    def collecting(self) -> bool:
        return math.isinf(self.low)


def compare(first: Sums, second: Sums, alpha: float, *, tau: float = TAU) -> Difference:
    """Compare two arms by the sequential t. `alpha` is spent over all looks together.

    One arm may be without variation: a control that never fails is the usual case.
    """
    value = second.value - first.value
    enough = min(first.n, second.n) >= MIN_UNITS
    variance = _squared_error(first, second) if enough else 0.0
    if variance == 0.0:
        return Difference(value, -math.inf, math.inf, 0.0)
    freedom = first.n + second.n - 2
    k = 1 + tau * tau * first.n * second.n / (first.n + second.n)
    return _sequential_t(value, variance, freedom, k, alpha)


def mean_of(sums: Sums, alpha: float, *, tau: float = TAU) -> Difference:
    """Return one group's mean, such as that of paired differences, against 0.

    The same sequential t with one sample: n units, n − 1 degrees of freedom, and a prior
    N(0, τ²) on the standardised mean.
    """
    variance = sums.spread / sums.n if sums.n >= MIN_UNITS else 0.0
    if variance == 0.0:
        return Difference(sums.value, -math.inf, math.inf, 0.0)
    return _sequential_t(sums.value, variance, sums.n - 1, 1 + tau * tau * sums.n, alpha)


def _sequential_t(
    value: float, variance: float, freedom: int, k: float, alpha: float
) -> Difference:
    """Return the test of a mean, or a difference of means, whose squared error is `variance`."""
    t2 = value * value / variance
    log_e = -0.5 * math.log(k) + (freedom + 1) / 2 * (
        math.log1p(t2 / freedom) - math.log1p(t2 / (freedom * k))
    )
    half = _half_width(variance, freedom, k, alpha)
    return Difference(value, value - half, value + half, log_e)


def _squared_error(first: Sums, second: Sums) -> float:
    """Return the larger of the pooled and of Welch's squared standard error.

    Where neither arm varies, it is that of all units around their common mean, d²/n: an arm that
    always fails beside one that never does must not wait for variation. 0 for equal constants.
    """
    freedom = first.n + second.n - 2
    if first.spread == second.spread == 0.0:
        same = math.isclose(first.value, second.value, rel_tol=ROUNDING)
        return 0.0 if same else (second.value - first.value) ** 2 / (first.n + second.n)
    pooled = ((first.n - 1) * first.spread + (second.n - 1) * second.spread) / freedom
    return max(
        pooled * (1 / first.n + 1 / second.n),
        first.spread / first.n + second.spread / second.n,
    )


def _half_width(variance: float, freedom: float, k: float, alpha: float) -> float:
    """Solve log e = log 1/α for the difference. Infinite while no difference could be shown."""
    c = math.exp(2 / (freedom + 1) * math.log(math.sqrt(k) / alpha))
    return math.sqrt(freedom * (c - 1) / (1 - c / k) * variance) if c < k else math.inf


def mismatch_log_e(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Return the evidence, as log e, that units did not split as intended."""
    n, k = sum(counts), SRM_STRENGTH
    gained = sum(
        math.lgamma(k * share + count) - math.lgamma(k * share)
        for count, share in zip(counts, shares, strict=True)
    )
    expected = sum(c * math.log(s) for c, s in zip(counts, shares, strict=True) if c)
    return math.lgamma(k) - math.lgamma(k + n) + gained - expected


def is_mismatch(counts: Sequence[int], shares: Sequence[float]) -> bool:
    """Tell whether the split is so far from what was meant that no result can be believed."""
    return mismatch_log_e(counts, shares) > -math.log(SRM_ALPHA)


def shares_log_e(first: tuple[int, int], second: tuple[int, int], share: float) -> float:
    """Return the evidence, as log e, that a share is worse in the second arm or in the first.

    Exact at any number of units: given how units split (`share` is the second arm's part), equal
    shares make arm and outcome independent. Each arm is (units, successes).
    """
    (n1, s1), (n2, s2) = first, second
    f1, f2 = n1 - s1, n2 - s2
    terms = [
        s2 * math.log(on) + s1 * math.log1p(-on) + f2 * math.log(off) + f1 * math.log1p(-off)
        for on, off in _alternatives(share)
    ]
    null = (n2 * math.log(share)) + (n1 * math.log1p(-share))
    top = max(terms)
    mean = top + math.log(sum(math.exp(term - top) for term in terms) / len(terms))
    return mean - null


@lru_cache(maxsize=64)
def _alternatives(share: float) -> tuple[tuple[float, float], ...]:
    """Return, for a grid of shares and odds ratios, which part of the successes and of the failures
    is the second arm's.
    """
    pairs: list[tuple[float, float]] = []
    for step in range(1, 15):
        first = 1 / (1 + math.exp(-(-5 + step * 10 / 15)))
        for log_odds in (x / 8 for x in range(-16, 17) if x):
            odds = first / (1 - first) * math.exp(log_odds)
            second = odds / (1 + odds)
            on = share * second / (share * second + (1 - share) * first)
            off = share * (1 - second) / (share * (1 - second) + (1 - share) * (1 - first))
            pairs.append((on, off))
    return tuple(pairs)


def units_for(
    effect: float, deviation: float, share: float, alpha: float, power: float = 0.5
) -> int:
    """Return how many units in both arms show a true difference of `effect`, with this chance.

    At 0.5 that is where the interval is ± `effect`. It is the chance at one look with so many
    units; those before it only add to it. `deviation` is a unit's standard deviation (√(p(1−p))
    for a share p), `share` the second arm's part of the units.
    """
    luck = NormalDist().inv_cdf(power)  # standard errors that the difference may fall short by
    low, high = 2 * MIN_UNITS, 10**12
    while low < high:
        n = (low + high) // 2
        n2 = n * share
        k = 1 + TAU * TAU * (n - n2) * n2 / n
        variance = deviation**2 * (1 / n2 + 1 / (n - n2))
        needed = _half_width(variance, n - 2, k, alpha) + luck * math.sqrt(variance)
        low, high = (low, n) if needed <= effect else (n + 1, high)
    return low
