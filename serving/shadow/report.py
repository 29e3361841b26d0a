"""A comparison as people and scripts read it: each measure with its interval, and in words.

The intervals hold at every look together, at 95 % each: a shadow may be watched while it grows.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from serving.experiments.experiment import Arm
from serving.experiments.sequential import MIN_UNITS, Sums, mean_of
from serving.shadow.comparison import Comparison
from serving.shadow.store import Comparisons, Tally
from serving.shadow.sums import Measured

ALPHA = 0.05

WHY = {
    "busy": "too many were being mirrored, or the engine had no room",
    "late": "the candidate was not done in time",
    "unfinished": "production's answer did not come to its end",
    "other": "another version answered, by a promote or an experiment",
    "raw": "the candidate is only a prompt, and the request was no chat",
    "lost": "it could not be written down",
    "tools": "they were calls of tools, and the log does not say which tools were offered",
    "unfit": "the prompt leaves no room for an answer, or the chat template refuses it",
}

IMAGINED = 2  # units at either end

# Measures between two bounds; the others may be anything.
_BOUNDS = {
    "failed": (0.0, 1.0),
    "same": (0.0, 1.0),
    "prefix": (0.0, 1.0),
    "equal": (0.0, 1.0),
    "ended": (-1.0, 1.0),
    "json": (-1.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A mean over units. The bounds are None while there are too few of them."""

    measure: str
    value: float
    low: float | None
    high: float | None
    units: int


def readings(tally: Tally) -> list[Reading]:
    """Return every measure that some pair has, in the order of `sums.MEASURES`."""
    return [read(name, measured) for name, measured in tally.measures.items() if measured.sums.n]


def read(name: str, measured: Measured) -> Reading:
    """Return a measure's mean, with its interval once there are enough units."""
    sums = measured.sums
    reach = max(abs(measured.least), abs(measured.most))
    low, high = _BOUNDS.get(name, (-reach, reach))
    found = mean_of(_with_ends(sums, low, high), ALPHA)
    if found.collecting or sums.n < MIN_UNITS:
        return Reading(name, sums.value, None, None, sums.n)
    if name not in _BOUNDS:
        low, high = -math.inf, math.inf
    # What was seen is inside, though the imagined units pull the middle away from the ends.
    low, high = max(low, min(found.low, sums.value)), min(high, max(found.high, sums.value))
    return Reading(name, sums.value, low, high, sums.n)


def _with_ends(sums: Sums, low: float, high: float) -> Sums:
    """Add imagined units at either end of what can be, or as far out as any unit was.

    Without them rare values are missed for too long: a hundred equal answers would leave no room
    for the first different one. As many as in A. Agresti and B. Coull, Approximate is better than
    "exact" for interval estimation, 1998; that it holds at all looks is shown by simulation.
    """
    x = sums.x / sums.n
    ends, squares = IMAGINED * (low + high), IMAGINED * (low * low + high * high)
    more = 2 * IMAGINED
    return Sums(
        sums.n + more,
        sums.y + ends * x,
        sums.yy + squares * x * x,
        sums.x + more * x,
        sums.xx + more * x * x,
        sums.xy + ends * x * x,
    )


def summarize(comparison: Comparison) -> dict[str, Any]:
    """Return what is compared and its state."""
    return {
        "id": comparison.id,
        "object": comparison.kind,
        "name": str(comparison.name),
        "production": _version(comparison.production),
        "candidate": _version(comparison.candidate),
        "share": comparison.share,
        "state": comparison.state,
        "reason": comparison.reason,
        "created_at": comparison.created_at,
        "ended_at": comparison.ended_at,
    }


def describe(
    store: Comparisons, comparison: Comparison, skipped: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return what is compared, the numbers as of now, and what they say.

    `skipped` is of a replay that has just ended: it keeps no such counts.
    """
    tally = store.tally(comparison)
    tally = replace(tally, skipped=tally.skipped | (skipped or {}))
    found = readings(tally)
    return {
        **summarize(comparison),
        "pairs": tally.pairs,
        "units": tally.units,
        "skipped": tally.skipped,
        "measures": [asdict(reading) for reading in found],
        "sentences": sentences(tally, found),
    }


def _version(arm: Arm) -> dict[str, str]:
    return {"version": arm.version, "digest": f"sha256:{arm.digest}"}


def sentences(tally: Tally, found: list[Reading]) -> list[str]:
    """Say the numbers in words, the most telling first."""
    if not tally.pairs:
        return ["There is no pair yet.", *_missed(tally)]
    by_name = {reading.measure: reading for reading in found}
    said = [f"{tally.pairs} pairs of {tally.units} units."]
    said += [say(by_name[name], tally) for name, say in _SAY.items() if name in by_name]
    if by_name["failed"].units < MIN_UNITS:
        said.append(f"Intervals are drawn from {MIN_UNITS} units on.")
    return [*said, *_missed(tally)]


def _missed(tally: Tally) -> list[str]:
    return [
        f"{count} requests made no pair: {WHY.get(why, why)}."
        for why, count in sorted(tally.skipped.items())
    ]


def _percent(reading: Reading) -> str:
    return f"{100 * reading.value:.1f} %{_span(reading, 100, ' %')}"


def _span(reading: Reading, scale: float = 1.0, unit: str = "", *, sign: str = "") -> str:
    if reading.low is None or reading.high is None:
        return ""
    return f" ({scale * reading.low:{sign}.1f} to {scale * reading.high:{sign}.1f}{unit})"


def _side(reading: Reading, above: str, below: str) -> str:
    """Say on which side of 0 it is, as far as the interval shows it."""
    if reading.low is None or reading.high is None:
        return ""
    if reading.low > 0:
        return f": {above}"
    return f": {below}" if reading.high < 0 else ": no difference is shown"


def _say_failed(reading: Reading, _: Tally) -> str:
    if reading.value == 0:
        return "The candidate failed on none."
    return f"The candidate failed on {_percent(reading)}."


def _say_same(reading: Reading, _: Tally) -> str:
    return f"{_percent(reading)} of the answers are the same, token by token."


def _say_prefix(reading: Reading, _: Tally) -> str:
    return f"Up to the first difference {_percent(reading)} of an answer is equal."


def _say_equal(reading: Reading, _: Tally) -> str:
    return f"At the same place {_percent(reading)} of an answer's tokens are equal."


def _say_length(reading: Reading, _: Tally) -> str:
    side = _side(reading, "its answers are longer", "its answers are shorter")
    span = _span(reading, sign="+")
    return f"The candidate's answers have {reading.value:+.1f} tokens{span}{side}."


def _say_ended(reading: Reading, _: Tally) -> str:
    side = _side(reading, "it comes to an end more often", "it runs into the bound more often")
    span = _span(reading, 100, " %", sign="+")
    return f"Answers that end by themselves: {100 * reading.value:+.1f} %{span}{side}."


def _say_json(reading: Reading, tally: Tally) -> str:
    side = _side(reading, "it keeps the format more often", "it breaks the format more often")
    span = _span(reading, 100, " %", sign="+")
    return (
        f"Where JSON was asked for or is production's answer, {tally.candidate_json} of "
        f"{tally.json_expected} of the candidate's are JSON, {100 * reading.value:+.1f} %"
        f"{span}{side}."
    )


def _say_logprob(reading: Reading, tally: Tally) -> str:
    bounded = ""
    if tally.bounded:
        bounded = (
            f" At most: in {tally.bounded} pairs the first different token is not among the "
            "candidate's likely ones."
        )
    return (
        f"The candidate gives production's tokens, up to the first different one, "
        f"{reading.value:.3f} nats each{_nats(reading)}.{bounded}"
    )


def _say_difference(reading: Reading, _: Tally) -> str:
    side = _side(reading, "it likes them more", "it likes them less")
    return (
        f"That is {reading.value:+.3f} nats against what production itself gives them"
        f"{_nats(reading)}{side}."
    )


def _nats(reading: Reading) -> str:
    if reading.low is None or reading.high is None:
        return ""
    return f" ({reading.low:.3f} to {reading.high:.3f})"


def _say_slower(reading: Reading, _: Tally) -> str:
    times = math.exp(reading.value)
    span = ""
    if reading.low is not None and reading.high is not None:
        span = f" ({math.exp(reading.low):.2f} to {math.exp(reading.high):.2f})"
    return (
        f"It took {times:.2f} times as long{span}, behind all other requests: that tells of the "
        "load more than of the version."
    )


_SAY: dict[str, Callable[[Reading, Tally], str]] = {
    "failed": _say_failed,
    "same": _say_same,
    "prefix": _say_prefix,
    "equal": _say_equal,
    "length": _say_length,
    "ended": _say_ended,
    "json": _say_json,
    "logprob": _say_logprob,
    "logprob_difference": _say_difference,
    "slower": _say_slower,
}
