"""Golden values: the two roots x of (p − x)² = z²·x·(1 − x)/n, solved apart from the code."""

import pytest

from training.evaluation.statistics import wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
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
