"""Golden values from hand, scipy, or a formula solved apart from the code; coverage by simulation.

Every bound on coverage comes with a control: an interval known to be too narrow must fail it.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from training.evaluation import planning
from training.evaluation.resample import bootstrap, sign_flips
from training.evaluation.statistics import (
    Z_95,
    Interval,
    clustered_error,
    holm,
    mcnemar,
    mean_of,
    paired,
    share_of,
    wilson,
)

Ends = tuple[float, float]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # The two roots x of (p − x)² = z²·x·(1 − x)/n, solved apart from the code.
    [
        (0, 60, 0.0, 0.06017185),
        (28, 60, 0.34627906, 0.59106573),
        (60, 60, 0.93982815, 1.0),
        (1, 1, 0.20654931, 1.0),
        (88, 125, 0.61886043, 0.77697489),
        (5, 10, 0.23659309, 0.76340691),
    ],
)
def test_the_wilson_interval_equals_golden_values(
    successes: int, trials: int, low: float, high: float
) -> None:
    interval = wilson(successes, trials)
    assert interval.value == pytest.approx(successes / trials)
    assert interval.low == pytest.approx(low, abs=1e-7)
    assert interval.high == pytest.approx(high, abs=1e-7)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 5), (6, 5)])
def test_no_interval_is_made_up_for_what_is_no_share(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, trials)


def test_the_ends_are_exact() -> None:
    assert wilson(0, 7).low == 0.0
    assert wilson(7, 7).high == 1.0


def test_items_of_one_group_count_as_less_than_items() -> None:
    right = [True, True, False, False, True, True, False, False] * 5
    alone, together = list(range(40)), [n // 2 for n in range(40)]
    assert share_of(right, alone) == wilson(20, 40)
    # Whole pairs agree: variance is that of 20 groups, 1/4 · 20/19 / 20, and t(19) is 2.0930240544.
    effective = 19 * (Z_95 / 2.0930240544082634) ** 2
    clustered = share_of(right, together)
    golden = wilson(effective / 2, effective)
    assert (clustered.low, clustered.high) == pytest.approx((golden.low, golden.high))


def test_answers_that_are_all_right_are_as_sure_as_their_groups() -> None:
    assert share_of([True] * 12, [n // 3 for n in range(12)]) == wilson(4, 4)
    assert share_of([False] * 12, [n // 3 for n in range(12)]).high == wilson(0, 4).high


def test_one_group_is_one_observation() -> None:
    assert share_of([True, False], ["a", "a"]).low == pytest.approx(wilson(0.5, 1).low)


def test_the_clustered_error_equals_golden_values() -> None:
    values = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    # Sums of (value − ½) by group: 1, −1, 0; √(3/2 · 2) / 6.
    assert clustered_error(values, ["a", "a", "b", "b", "c", "c"]) == pytest.approx(3**0.5 / 6)
    alone = clustered_error(values, range(6))
    assert alone == pytest.approx(float(stats.sem(values)))


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (5, 0), (27, 2), (2, 7), (1, 7), (30, 30), (200, 150)]
)
def test_mcnemar_is_the_sign_test_over_discordant_items(wins: int, losses: int) -> None:
    golden = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(golden, rel=1e-9)


def test_mcnemar_equals_golden_values() -> None:
    assert mcnemar(2, 7) == pytest.approx(2 * (1 + 9 + 36) / 512)
    assert mcnemar(5, 0) == 2 / 32


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_paired_comparison_of_right_and_wrong_is_mcnemar_with_an_adjusted_interval() -> None:
    first = [1.0] * 9 + [1.0] * 2 + [0.0] * 7 + [0.0] * 2
    second = [1.0] * 9 + [0.0] * 2 + [1.0] * 7 + [0.0] * 2
    found = paired(first, second, range(20))
    assert (found.value, found.wins, found.losses) == (0.25, 7, 2)
    assert found.p == mcnemar(7, 2)
    # p₁ = 8/22, p₂ = 3/22: 5/22 ± z·√((11/22 − 25/484) / 22).
    reach = Z_95 * math.sqrt((0.5 - 25 / 484) / 22)
    assert (found.low, found.high) == pytest.approx((5 / 22 - reach, 5 / 22 + reach))


def test_a_paired_comparison_of_real_values_agrees_with_scipy() -> None:
    generator = np.random.default_rng(1)
    first = generator.beta(2, 3, 40)
    second = np.clip(first + generator.normal(0.05, 0.1, 40), 0, 1)
    found = paired(list(first), list(second), range(40))
    golden = stats.ttest_rel(second, first)
    ends = golden.confidence_interval()
    assert found.value == pytest.approx(float(np.mean(second - first)))
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=0.004)
    assert found.p == pytest.approx(golden.pvalue, abs=0.01)
    assert paired(list(first), list(second), range(40)) == found, "the same seed, the same answer"
    swapped = paired(list(second), list(first), range(40))
    assert (swapped.value, swapped.p) == pytest.approx((-found.value, found.p), abs=1e-12)


def test_equal_systems_are_not_told_apart() -> None:
    found = paired([0.3, 0.4, 0.5], [0.3, 0.4, 0.5], "abc")
    assert (found.value, found.p, found.wins, found.losses) == (0.0, 1.0, 0, 0)


def test_lists_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        paired([0.1], [0.1, 0.2], "ab")


def test_the_bootstrap_equals_that_of_scipy() -> None:
    values = np.random.default_rng(3).beta(1, 4, 30)
    tail = float(stats.norm.cdf(-math.sqrt(30 / 29) * stats.t.ppf(0.975, 29)))
    golden = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * tail, method="percentile", rng=5
    ).confidence_interval
    found = mean_of(list(values), range(30))
    assert (found.low, found.high) == pytest.approx((golden.low, golden.high), abs=0.005)


def test_the_bootstrap_takes_any_function_of_sums() -> None:
    """2·right / (said + true), by hand for resamples of two groups: 1, or ⅔, or 0."""
    columns = np.array([[2.0, 2.0, 2.0], [0.0, 1.0, 1.0]])

    def f1(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return 2 * sums[..., 0] / (sums[..., 1] + sums[..., 2])

    assert bootstrap(columns, "ab", f1, seed=0) == (0.0, 1.0)


def test_what_shows_no_spread_is_not_called_certain() -> None:
    assert mean_of([0.5, 0.5, 0.5], "aaa") == Interval(0.5, 0.0, 1.0), "one group says nothing"
    assert mean_of([0.0] * 10, range(10)) == wilson(0, 10)
    assert mean_of([0.5] * 10, range(10)).low == pytest.approx(wilson(5, 10).low)
    same = paired([0.3] * 10, [0.3] * 10, range(10))
    assert (same.low, same.high) == pytest.approx((-0.2309841, 0.2309841))  # z·√(2/12/12)
    better = paired([0.0] * 20, [0.5] * 20, [n // 2 for n in range(20)])
    assert better.low < 0.5 <= better.high
    assert better.low > 0
    alone = paired([0.0, 0.2], [1.0, 0.8], "aa")
    assert (alone.low, alone.high, alone.p) == (-1.0, 1.0, 1.0)


def test_flipped_signs_equal_the_permutation_test_of_scipy() -> None:
    differences = np.array([0.3, -0.1, 0.2, 0.4, 0.15, -0.05, 0.25])
    golden = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=10_000
    )
    assert sign_flips(differences, range(7), seed=0) == pytest.approx(golden.pvalue)


@pytest.mark.parametrize(("wins", "losses", "error"), [(9, 2, 1e-12), (24, 12, 0.006)])
def test_flipped_signs_of_right_and_wrong_are_mcnemar(wins: int, losses: int, error: float) -> None:
    differences = np.array([1.0] * wins + [-1.0] * losses + [0.0] * 20)
    p = sign_flips(differences, range(len(differences)), seed=0)
    assert p == pytest.approx(mcnemar(wins, losses), abs=error)


def test_the_items_needed_equal_a_golden_value_and_reach_their_power() -> None:
    # (1.959964·√0.3 + 0.841621·√0.29)² / 0.01 = 233.09
    assert planning.items_needed(0.3, 0.1) == 234
    assert exact_power(234, 0.3, 0.1) == pytest.approx(0.8, abs=0.03)
    assert exact_power(117, 0.3, 0.1) < 0.55, "half the items must miss it"
    assert planning.detectable_difference(0.3, 234) == pytest.approx(0.1, abs=0.001)
    assert planning.detectable_difference(0.3, 5) == 0.3
    with pytest.raises(ValueError, match="cannot come from"):
        planning.items_needed(0.1, 0.2)
    with pytest.raises(ValueError, match="cannot come from"):
        planning.items_needed(0.1, 0.0)


def exact_power(items: int, discordant: float, difference: float) -> float:
    """Sum the probabilities of all discordant counts and wins that McNemar calls significant."""
    up = (discordant + difference) / 2 / discordant
    power = 0.0
    for count in range(items + 1):
        weight = float(stats.binom.pmf(count, items, discordant))
        if weight > 1e-9:
            wins = np.arange(count + 1)
            found = np.array([mcnemar(int(w), count - int(w)) < 0.05 for w in wins])
            power += weight * float(stats.binom.pmf(wins, count, up)[found].sum())
    return power


def test_a_mean_difference_is_detectable_at_2_8_standard_errors() -> None:
    assert planning.detectable_mean(0.01) == pytest.approx(0.0280158, abs=1e-7)


@pytest.mark.parametrize(
    ("training", "each", "other", "requests"),
    [(1000.0, 1.0, 3.0, 500), (1001.0, 1.0, 3.0, 501), (0.0, 1.0, 2.0, 0), (10.0, 2.0, 2.0, None)],
)
def test_a_training_is_paid_by_what_each_request_saves(
    training: float, each: float, other: float, requests: int | None
) -> None:
    assert planning.break_even(training, each, other) == requests


# Coverage: how often a 95 % interval holds the truth. 94 % on average is asked of what can be
# counted exactly, of what is simulated three standard errors below 95 %: 92.9 % at 1000
# runs, 91.7 % at 400.


def wald(successes: int, trials: int) -> Ends:
    share = successes / trials
    reach = Z_95 * math.sqrt(share * (1 - share) / trials)
    return share - reach, share + reach


def exact_coverage(interval: Callable[[int, int], Ends], trials: int) -> float:
    """Average over shares from 2 % to 98 %, each summed over all outcomes."""
    ends = [interval(successes, trials) for successes in range(trials + 1)]
    low, high = np.array([e[0] for e in ends]), np.array([e[1] for e in ends])
    shares = np.linspace(0.02, 0.98, 49)
    outcomes = np.arange(trials + 1)
    return float(
        np.mean(
            [stats.binom.pmf(outcomes, trials, p)[(low <= p) & (p <= high)].sum() for p in shares]
        )
    )


@pytest.mark.parametrize("trials", [8, 20, 60])
def test_wilson_covers_and_the_normal_interval_does_not(trials: int) -> None:
    def ends(successes: int, trials: int) -> Ends:
        found = wilson(successes, trials)
        return found.low, found.high

    assert exact_coverage(ends, trials) >= 0.94
    assert exact_coverage(wald, trials) < 0.94


def groups_of_answers(
    generator: np.random.Generator, groups: int, size: int
) -> tuple[list[bool], list[int]]:
    """Right answers with a share of 0.7; those of one group go together."""
    of_group = generator.beta(0.7, 0.3, groups)
    right = generator.random((groups, size)) < of_group[:, None]
    return [bool(answer) for answer in right.ravel()], [n // size for n in range(groups * size)]


def covers(ends: Iterator[Ends], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in ends]))


@pytest.mark.parametrize("groups", [10, 40])
def test_the_clustered_share_covers_and_ignoring_groups_does_not(groups: int) -> None:
    generator = np.random.default_rng(0)
    runs = [groups_of_answers(generator, groups, 4) for _ in range(1000)]
    known = [share_of(right, of) for right, of in runs]
    ignored = [wilson(sum(right), len(right)) for right, _ in runs]
    assert covers(((i.low, i.high) for i in known), 0.7) >= 0.929
    assert covers(((i.low, i.high) for i in ignored), 0.7) < 0.929


def pairs_coverage(interval: Callable[[int, int, int], Ends], items: int) -> float:
    """Average over shares of wins and losses, each summed over all outcomes of three kinds."""
    found: list[float] = []
    for up, down in [(0.1, 0.05), (0.2, 0.05), (0.3, 0.1), (0.05, 0.4), (0.1, 0.01), (0.04, 0.0)]:
        total = 0.0
        for wins in range(items + 1):
            for losses in range(items + 1 - wins):
                low, high = interval(wins, losses, items)
                if low <= up - down <= high:
                    same = items - wins - losses
                    total += float(
                        math.comb(items, wins)
                        * math.comb(items - wins, losses)
                        * up**wins
                        * down**losses
                        * (1 - up - down) ** same
                    )
        found.append(total)
    return float(np.mean(found))


def test_the_paired_interval_covers_and_the_normal_one_does_not() -> None:
    def adjusted(wins: int, losses: int, items: int) -> Ends:
        first = [0.0] * wins + [1.0] * losses + [0.0] * (items - wins - losses)
        second = [1.0] * wins + [0.0] * losses + [0.0] * (items - wins - losses)
        found = paired(first, second, range(items))
        return found.low, found.high

    def normal(wins: int, losses: int, items: int) -> Ends:
        centre = (wins - losses) / items
        reach = Z_95 * math.sqrt(((wins + losses) / items - centre**2) / items)
        return centre - reach, centre + reach

    assert pairs_coverage(adjusted, 20) >= 0.94
    assert pairs_coverage(normal, 20) < 0.94


@pytest.mark.parametrize("size", [1, 4])
def test_the_bootstrap_covers_and_the_normal_interval_does_not(size: int) -> None:
    """Six groups; the control takes the normal distribution and looks at items alone."""
    generator = np.random.default_rng(0)
    known: list[Ends] = []
    ignored: list[Ends] = []
    for _ in range(400):
        values = (generator.beta(3, 3, (6, 1)) + generator.normal(0, 0.02, (6, size))).ravel()
        found = mean_of(list(values), [n // size for n in range(6 * size)])
        known.append((found.low, found.high))
        reach = Z_95 * float(stats.sem(values))
        ignored.append((values.mean() - reach, values.mean() + reach))
    assert covers(iter(known), 0.5) >= 0.917
    assert covers(iter(ignored), 0.5) < 0.917


def test_flipped_signs_keep_their_level_and_ignoring_groups_does_not() -> None:
    generator = np.random.default_rng(0)
    known: list[bool] = []
    ignored: list[bool] = []
    for _ in range(300):
        of_group = generator.normal(0, 0.1, 12)
        differences = (of_group[:, None] + generator.normal(0, 0.02, (12, 4))).ravel()
        known.append(sign_flips(differences, [n // 4 for n in range(48)], seed=0) < 0.05)
        ignored.append(sign_flips(differences, range(48), seed=0) < 0.05)
    assert np.mean(known) <= 0.0875, "5 % and three standard errors"
    assert np.mean(ignored) > 0.0875
