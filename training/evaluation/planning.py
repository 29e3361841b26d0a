"""How many items a difference needs to be seen, and how many requests a training to be paid."""

import math

from scipy.special import ndtri

from training.evaluation.statistics import Z_95

Z_POWER = float(ndtri(0.8))


def items_needed(discordant: float, difference: float) -> int:
    """Return the items at which a paired comparison finds a difference with 80 % power at 5 %.

    `discordant` is the share of items that one of the two gets right and the other wrong, and
    `difference` of the two shares, at most as large. R. Connor, Sample size for testing differences
    in proportions for the paired-sample design, 1987: (z·√ψ + z'·√(ψ − δ²))² / δ².
    Raises ValueError for no difference, which no number of items shows.
    """
    if not 0 < abs(difference) <= discordant <= 1:
        raise ValueError(f"A difference of {difference} cannot come from {discordant} discordant.")
    return math.ceil(_connor(discordant, difference) / difference**2)


def detectable_difference(discordant: float, items: int) -> float:
    """Return the smallest difference that so many items find with 80 % power at 5 %.

    At most `discordant`, where even that is too small to be found. The inverse of `items_needed`,
    by bisection: the larger the difference, the fewer items.
    """
    if not 0 < discordant <= 1 or items < 1:
        raise ValueError(f"{items} items with {discordant} discordant show no difference.")
    low, high = 0.0, discordant
    for _ in range(60):
        middle = (low + high) / 2
        if _connor(discordant, middle) > items * middle**2:
            low = middle
        else:
            high = middle
    return high


def detectable_mean(error: float) -> float:
    """Return the smallest mean difference found with 80 % power at 5 %, from its standard error.

    (z + z')·error, E. Miller, Adding Error Bars to Evals, arXiv 2411.00640, section 5.
    """
    return (Z_95 + Z_POWER) * error


def break_even(training: float, each: float, each_other: float) -> int | None:
    """Return after how many requests a training is paid, or None: it never is.

    `each` is what a request costs with the trained version and `each_other` without it; all three
    in one unit (FLOPs, seconds, money).
    """
    saved = each_other - each
    return math.ceil(training / saved) if saved > 0 else None


def _connor(discordant: float, difference: float) -> float:
    spread = math.sqrt(max(0.0, discordant - difference**2))
    return (Z_95 * math.sqrt(discordant) + Z_POWER * spread) ** 2
