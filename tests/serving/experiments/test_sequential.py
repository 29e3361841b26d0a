"""The statistics: golden values, and simulations in which faulty designs must be caught."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.experiments.sequential import (
    MIN_UNITS,
    SRM_ALPHA,
    TAU,
    Sums,
    compare,
    is_mismatch,
    mismatch_log_e,
    shares_log_e,
    units_for,
)

ALPHA = 0.05
CHUNK = 100  # runs at once: the arrays of more would fill the memory
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Size:
    """How long the simulations are."""

    runs: int
    units: int

    @property
    def bound(self) -> float:
        """α and three standard errors of a share that was simulated so often."""
        return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / self.runs)


SIZES = [
    pytest.param(Size(300, 3000), id="short"),
    pytest.param(Size(1000, 5000), id="long", marks=pytest.mark.long),
]


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> Size:
    return request.param


def binary(n: int, successes: int) -> Sums:
    return Sums.of_means(n, successes, successes)


def test_golden_values_of_the_sequential_t() -> None:
    found = compare(binary(1000, 100), binary(1010, 150), ALPHA)
    assert found.value == pytest.approx(0.048515, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.0035788, 0.0934509), abs=1e-6)
    assert found.log_e == pytest.approx(3.638600, abs=1e-5)
    assert found.p == pytest.approx(0.026289, abs=1e-6)
    found = compare(binary(9000, 900), binary(1000, 70), ALPHA)
    assert (found.low, found.high) == pytest.approx((-0.05994, -0.0000566), abs=1e-5)
    assert found.log_e == pytest.approx(3.011410, abs=1e-5)
    found = compare(binary(500, 0), binary(500, 40), ALPHA)
    assert (found.low, found.high) == pytest.approx((0.0412, 0.1188), abs=1e-4)


def test_golden_value_of_the_sample_ratio_mismatch() -> None:
    assert mismatch_log_e([5000, 5300], [0.5, 0.5]) == pytest.approx(2.003268, abs=1e-5)
    assert not is_mismatch([5000, 5300], [0.5, 0.5])
    assert is_mismatch([5000, 6000], [0.5, 0.5])


def test_the_interval_is_the_stopping_rule() -> None:
    """It leaves zero out exactly when the evidence passes 1/α."""
    for successes in range(100, 200):
        found = compare(binary(1000, 100), binary(1010, successes), ALPHA)
        assert (found.low > 0 or found.high < 0) == (found.log_e > math.log(1 / ALPHA))


def test_too_few_units_are_no_evidence() -> None:
    found = compare(binary(MIN_UNITS - 1, 0), binary(5000, 4000), ALPHA)
    assert found.collecting
    assert found.p == 1.0
    assert compare(binary(500, 500), binary(900, 900), ALPHA).collecting, "all units are alike"


def test_an_arm_that_always_fails_beside_one_that_never_does_is_told_apart() -> None:
    found = compare(binary(MIN_UNITS, 0), binary(MIN_UNITS, MIN_UNITS), ALPHA)
    assert found.low > 0
    assert found.log_e > math.log(1 / ALPHA)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 / 7])
def test_equal_constants_do_not_differ_by_rounding(value: float) -> None:
    first, second = (np.full(n, value) for n in (150, 171))
    sums = [Sums.of_means(len(v), sum(v.tolist()), sum((v * v).tolist())) for v in (first, second)]
    assert compare(sums[0], sums[1], ALPHA).collecting


def test_a_ratio_with_one_answer_a_unit_is_a_mean() -> None:
    rng = np.random.default_rng(1)
    y = rng.normal(3, 2, 500)
    mean = Sums.of_means(500, y.sum(), (y * y).sum())
    ratio = Sums(500, y.sum(), (y * y).sum(), 500, 500, y.sum())
    assert ratio.value == pytest.approx(y.mean())
    assert mean.spread == pytest.approx(y.var(ddof=1)) == ratio.spread


# Simulations. `cumulative` holds, after every unit, the sums of one run: the test looks each time.


def looks(y: Array, arm: NDArray[np.bool_], x: Array | None = None) -> Array:
    """Return the largest log e over all looks of each run; y, arm and x are [runs, units]."""
    x = np.ones_like(y) if x is None else x
    parts = []
    for chosen in (~arm, arm):
        keep = chosen.astype(float)
        parts.append([np.cumsum(v * keep, 1) for v in (np.ones_like(y), y, y * y, x, x * x, x * y)])
    return log_e(parts[0], parts[1])


def log_e(first: list[Array], second: list[Array], *, welch_only: bool = False) -> Array:
    """The formula of `compare` over whole arrays; held to `compare` by a test below."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values, spreads = [], []
        for n, y, yy, x, xx, xy in (first, second):
            r = y / x
            values.append(r)
            spreads.append((yy - 2 * r * xy + r * r * xx) / (x / n) ** 2 / (n - 1))
        n1, n2 = first[0], second[0]
        nu = n1 + n2 - 2
        welch = spreads[0] / n1 + spreads[1] / n2
        pooled = ((n1 - 1) * spreads[0] + (n2 - 1) * spreads[1]) / nu * (1 / n1 + 1 / n2)
        variance = welch if welch_only else np.maximum(welch, pooled)
        k = 1 + TAU**2 * n1 * n2 / (n1 + n2)
        t2 = (values[1] - values[0]) ** 2 / variance
        e = -0.5 * np.log(k) + (nu + 1) / 2 * (np.log1p(t2 / nu) - np.log1p(t2 / (nu * k)))
    ready = (np.minimum(n1, n2) >= MIN_UNITS) & (variance > 0)
    return np.where(ready, e, 0.0).max(axis=1)


def rejected(size: Size, largest_log_e: Callable[[], Array]) -> float:
    """Return the share of runs whose evidence passes 1/α; the callable simulates CHUNK of them."""
    evidence = np.concatenate([largest_log_e() for _ in range(size.runs // CHUNK)])
    return float((evidence > math.log(1 / ALPHA)).mean())


def arms(rng: np.random.Generator, share: float, units: int) -> NDArray[np.bool_]:
    return rng.random((CHUNK, units)) < share


def shares(rng: np.random.Generator, rate: float | NDArray[np.floating[Any]], units: int) -> Array:
    """Return outcomes that are 1 at this rate."""
    return (rng.random((CHUNK, units)) < rate).astype(float)


def test_the_simulation_computes_what_the_product_does() -> None:
    rng = np.random.default_rng(3)
    y, arm = (rng.random((1, 1500)) < 0.1).astype(float), rng.random((1, 1500)) < 0.3
    largest = 0.0
    for n in range(1, 1501):
        sides = [y[0, :n][side] for side in (~arm[0, :n], arm[0, :n])]
        first, second = (Sums.of_means(len(v), v.sum(), (v * v).sum()) for v in sides)
        largest = max(largest, compare(first, second, ALPHA).log_e)
    assert looks(y, arm)[0] == pytest.approx(largest, abs=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_equal_shares_are_told_apart_seldom(size: Size, rate: float, share: float) -> None:
    rng = np.random.default_rng([round(100 * rate), round(10 * share)])

    def run() -> Array:
        return looks(shares(rng, rate, size.units), arms(rng, share, size.units))

    assert rejected(size, run) <= size.bound


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_equal_means_of_skewed_values_are_told_apart_seldom(size: Size, share: float) -> None:
    rng = np.random.default_rng([7, round(10 * share)])

    def run() -> Array:
        return looks(rng.lognormal(0, 1, (CHUNK, size.units)), arms(rng, share, size.units))

    assert rejected(size, run) <= size.bound


def test_equal_means_of_unequal_variance_are_told_apart_seldom(size: Size) -> None:
    rng = np.random.default_rng(11)

    def run() -> Array:
        arm = arms(rng, 0.1, size.units)
        return looks(rng.normal(0, 1, arm.shape) * np.where(arm, 3.0, 1.0), arm)

    assert rejected(size, run) <= size.bound


def clustered(rng: np.random.Generator, size: Size) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Users with 1 to 19 answers each and a taste of their own: (Σy, answers, arm) a user."""
    users = size.units // 5
    count = rng.integers(1, 20, (CHUNK, users)).astype(float)
    taste = rng.beta(1, 3, (CHUNK, users))
    return rng.binomial(count.astype(int), taste).astype(float), count, arms(rng, 0.5, users)


def test_users_with_many_answers_are_one_unit_each(size: Size) -> None:
    rng = np.random.default_rng(13)

    def run() -> Array:
        y, x, arm = clustered(rng, size)
        return looks(y, arm, x)

    assert rejected(size, run) <= size.bound


def ramped(rng: np.random.Generator, units: int) -> tuple[Array, NDArray[np.intp]]:
    """A base rate that drifts while the ramp goes up: (outcomes, how far the ramp is)."""
    stage = np.minimum(np.arange(units) * 3 // units, 2)
    return shares(rng, np.array([0.1, 0.2, 0.3])[stage], units), stage


def test_a_ramp_of_exposure_keeps_its_fixed_split(size: Size) -> None:
    rng = np.random.default_rng(17)

    def run() -> Array:
        y, stage = ramped(rng, size.units)
        exposed = rng.random(y.shape) < np.array([0.02, 0.2, 1.0])[stage]
        arm = arms(rng, 0.5, size.units)
        parts = []
        for chosen in (exposed & ~arm, exposed & arm):
            keep = chosen.astype(float)
            parts.append([np.cumsum(v * keep, 1) for v in (keep, y, y * y, keep, keep, y)])
        return log_e(parts[0], parts[1])

    assert rejected(size, run) <= size.bound


# Negative controls: designs that are known to fail must fail here too.


def test_control_a_plain_z_that_is_looked_at_fails(size: Size) -> None:
    rng = np.random.default_rng(19)

    def run() -> Array:
        y, arm = shares(rng, 0.1, size.units), arms(rng, 0.5, size.units)
        n1, n2 = np.cumsum(~arm, 1), np.cumsum(arm, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            p1, p2 = np.cumsum(y * ~arm, 1) / n1, np.cumsum(y * arm, 1) / n2
            p = np.cumsum(y, 1) / (n1 + n2)
            z = np.abs(p2 - p1) / np.sqrt(p * (1 - p) * (1 / n1 + 1 / n2))
        crossed = np.where(np.minimum(n1, n2) >= MIN_UNITS, z, 0.0).max(axis=1) > 1.96
        return np.where(crossed, np.inf, 0.0)

    assert rejected(size, run) > size.bound


def test_control_answers_taken_for_units_fail(size: Size) -> None:
    rng = np.random.default_rng(23)

    def run() -> Array:
        y, x, arm = clustered(rng, size)
        totals = []
        for chosen in (~arm, arm):
            n, s = np.cumsum(x * chosen, 1), np.cumsum(y * chosen, 1)
            totals.append([n, s, s, n, n, s])  # as if every answer were a unit: y² = y
        return log_e(totals[0], totals[1])

    assert rejected(size, run) > size.bound


def test_control_a_ramp_by_weights_fails(size: Size) -> None:
    rng = np.random.default_rng(29)

    def run() -> Array:
        y, stage = ramped(rng, size.units)
        return looks(y, rng.random(y.shape) < np.array([0.1, 0.25, 0.5])[stage])

    assert rejected(size, run) > size.bound


@pytest.mark.parametrize(
    ("base", "lift", "share"), [(0.1, 0.03, 0.5), (0.5, 0.05, 0.5), (0.1, 0.05, 0.1)]
)
def test_the_interval_covers_a_real_effect_at_every_look(
    size: Size, base: float, lift: float, share: float
) -> None:
    rng = np.random.default_rng([31, round(100 * base), round(100 * lift)])

    def run() -> Array:
        arm = arms(rng, share, size.units)
        y = shares(rng, base + lift * arm, size.units)
        # Taking the true lift away from the treated leaves no difference to find.
        return looks(np.asarray(y - lift * arm, float), arm)

    assert rejected(size, run) <= size.bound


def test_a_planted_effect_is_found(size: Size) -> None:
    rng = np.random.default_rng(37)

    def run() -> Array:
        arm = arms(rng, 0.5, size.units)
        return looks(shares(rng, 0.1 + 0.08 * arm, size.units), arm)

    assert rejected(size, run) > 0.9


def test_a_fair_split_raises_no_alarm_and_a_skewed_one_does() -> None:
    rng = np.random.default_rng(41)
    alarms = {0.5: 0, 0.45: 0}
    for share in alarms:
        for _ in range(200):
            second = np.cumsum(rng.random(4000) < share)
            looks_at = range(100, 4001, 100)
            counts = [(n - int(second[n - 1]), int(second[n - 1])) for n in looks_at]
            alarms[share] += any(is_mismatch(pair, [0.5, 0.5]) for pair in counts)
    assert alarms[0.5] / 200 <= SRM_ALPHA + 3 * math.sqrt(SRM_ALPHA / 200)
    assert alarms[0.45] / 200 > 0.9


@pytest.mark.parametrize(("rate", "share"), [(0.5, 0.5), (0.02, 0.5), (0.02, 0.1)])
def test_the_exact_test_of_few_units_holds_its_level(size: Size, rate: float, share: float) -> None:
    rng = np.random.default_rng([43, round(100 * rate), round(10 * share)])
    crossed = 0
    for _ in range(size.runs):
        arm, y = rng.random(400) < share, rng.random(400) < rate
        for n in range(10, 401, 10):
            seen, done = arm[:n], y[:n]
            first = (int((~seen).sum()), int((done & ~seen).sum()))
            second = (int(seen.sum()), int((done & seen).sum()))
            if shares_log_e(first, second, share) > math.log(1 / ALPHA):
                crossed += 1
                break
    assert crossed / size.runs <= size.bound


def test_the_exact_test_sees_a_broken_arm_early() -> None:
    assert shares_log_e((40, 2), (40, 30), 0.5) > math.log(1 / ALPHA)
    assert shares_log_e((40, 2), (40, 3), 0.5) < 0.5


def test_the_planned_units_show_the_effect_about_every_second_time(size: Size) -> None:
    units = units_for(0.08, math.sqrt(0.14 * 0.86), 0.5, ALPHA)
    rng = np.random.default_rng(47)

    def run() -> Array:
        arm = arms(rng, 0.5, units)
        return looks(shares(rng, 0.1 + 0.08 * arm, units), arm)

    # Looking all the way crosses somewhat more often than the last look alone.
    assert 0.4 < rejected(size, run) < 0.85
