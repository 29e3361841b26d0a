"""How sure a measured share is."""

import math
from dataclasses import dataclass

Z_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


@dataclass(frozen=True, slots=True)
class Interval:
    """A share of successes with its 95 % interval. All between 0 and 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f}–{100 * self.high:.1f})"


def wilson(successes: int, trials: int) -> Interval:
    """Return the Wilson score interval of a share, without continuity correction.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927. It
    stays inside 0 and 1 and holds its level at small counts, where the normal one does not.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no share.")
    share = successes / trials
    z2 = Z_95 * Z_95
    centre = share + z2 / (2 * trials)
    spread = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # Rounding would leave a hair beside the exact ends.
    return Interval(share, 0.0 if successes == 0 else low, 1.0 if successes == trials else high)
