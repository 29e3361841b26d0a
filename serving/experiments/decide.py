"""What the numbers of an experiment say, and what is to be done about it. Pure functions.

In order: a split that is not what was meant stops everything, since no result can be believed
then; a guardrail that is harmed ends the experiment; only then may the primary metric speak.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from serving.experiments.answers import Counts
from serving.experiments.experiment import Experiment, Metric
from serving.experiments.sequential import (
    MIN_UNITS,
    Difference,
    Sums,
    compare,
    is_mismatch,
    shares_log_e,
    units_for,
)

Action = Literal["go on", "pause", "stop harmed", "win", "loss", "futile"]


@dataclass(frozen=True, slots=True)
class Reading:
    """One metric of one arm beside the control's."""

    metric: str
    arm: str
    control: float
    treated: float
    difference: Difference
    harmed: bool = False  # worse than the control, as far as a guardrail is concerned
    units_needed: int | None = None  # of both arms, to tell a difference of this size

    def plain(self) -> dict[str, Any]:
        """Return it for JSON, where an interval without an end is null."""
        d = self.difference
        ends = [None if math.isinf(end) else end for end in (d.low, d.high)]
        return {
            **{k: v for k, v in asdict(self).items() if k != "difference"},
            "difference": d.value,
            "low": ends[0],
            "high": ends[1],
            "p": d.p,
            "collecting": d.collecting,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done, why, and the numbers."""

    action: Action
    sentence: str
    winner: int | None = None  # an arm
    readings: tuple[Reading, ...] = ()
    units: tuple[int, ...] = ()
    mismatch: bool = False

    def plain(self) -> dict[str, Any]:
        return {
            "action": self.action,
            "sentence": self.sentence,
            "winner": self.winner,
            "units": list(self.units),
            "sample_ratio_mismatch": self.mismatch,
            "metrics": [reading.plain() for reading in self.readings],
        }


def decide(experiment: Experiment, counts: Sequence[Counts]) -> Verdict:
    """Judge an experiment as it stands. May be asked at any time, as often as one likes."""
    units = tuple(count.units for count in counts)
    if is_mismatch(units, [arm.share for arm in experiment.arms]):
        sentence = (
            f"The units split {' : '.join(map(str, units))}, which is not the split that was "
            "meant. Something drops or moves units; no result can be believed until it is found."
        )
        return Verdict("pause", sentence, units=units, mismatch=True)
    readings = tuple(
        _read(experiment, metric, arm, counts)
        for metric in experiment.metrics
        for arm in range(1, len(experiment.arms))
    )
    for reading in readings:
        if reading.harmed:
            sentence = _harm(reading, units[_arm_number(experiment, reading.arm)])
            return Verdict("stop harmed", sentence, readings=readings, units=units)
    return _judge_primary(experiment, readings, units)


def _read(experiment: Experiment, metric: Metric, arm: int, counts: Sequence[Counts]) -> Reading:
    control, treated = counts[0].metrics[metric.name], counts[arm].metrics[metric.name]
    alpha = _alpha(experiment, metric)
    difference = compare(control, treated, alpha)
    harmed = metric.role == "guardrail" and (
        _is_worse(metric, difference)
        or _is_worse_early(experiment, metric, arm, control, treated, alpha)
    )
    label = experiment.arms[arm].label
    share = treated.n / (control.n + treated.n) if treated.n else 0.0
    needed = None
    if not difference.collecting and difference.value:
        deviation = math.sqrt(max(control.spread, treated.spread))
        needed = units_for(abs(difference.value), deviation, share, alpha)
    return Reading(metric.name, label, control.value, treated.value, difference, harmed, needed)


def _alpha(experiment: Experiment, metric: Metric) -> float:
    """Share α over the arms, and among the guardrails over them as well (Bonferroni)."""
    arms = len(experiment.arms) - 1
    if metric.role == "guardrail":
        return experiment.policy.alpha / (arms * len(experiment.guardrails))
    return experiment.policy.alpha / arms


def _is_worse(metric: Metric, difference: Difference) -> bool:
    return difference.high < 0 if metric.better == "higher" else difference.low > 0


def _is_better(metric: Metric, difference: Difference) -> bool:
    return difference.low > 0 if metric.better == "higher" else difference.high < 0


def _is_worse_early(
    experiment: Experiment, metric: Metric, arm: int, control: Sums, treated: Sums, alpha: float
) -> bool:
    """Below MIN_UNITS the t form is silent; a share of units has an exact test at any number."""
    if metric.kind != "binary" or min(control.n, treated.n) >= MIN_UNITS or not treated.n:
        return False
    if (treated.value > control.value) == (metric.better == "higher"):
        return False
    share = experiment.arms[arm].share / (experiment.arms[arm].share + experiment.arms[0].share)
    pair = [(sums.n, round(sums.y)) for sums in (control, treated)]
    return shares_log_e(pair[0], pair[1], share) > math.log(1 / alpha)


def _arm_number(experiment: Experiment, label: str) -> int:
    return [arm.label for arm in experiment.arms].index(label)


def _harm(reading: Reading, units: int) -> str:
    early = ", by the exact test of few units"
    how = early if reading.difference.collecting else _interval(reading)
    return (
        f"{reading.arm} harms {reading.metric}: {reading.treated:.4g} against "
        f"{reading.control:.4g} of the control{how}. {units} units had met it."
    )


def _judge_primary(
    experiment: Experiment, readings: tuple[Reading, ...], units: tuple[int, ...]
) -> Verdict:
    primary = [r for r in readings if r.metric == experiment.primary.name]
    sign = 1 if experiment.primary.better == "higher" else -1
    ahead = [
        (sign * reading.difference.value, number)
        for number, reading in enumerate(primary, start=1)
        if _is_better(experiment.primary, reading.difference)
    ]
    if ahead:
        winner = max(ahead)[1]
        sentence = f"{_versus(primary[winner - 1])}: better{_interval(primary[winner - 1])}."
        return Verdict("win", sentence, winner, readings, units)
    if all(_is_worse(experiment.primary, reading.difference) for reading in primary):
        texts = [f"{_versus(reading)}: worse{_interval(reading)}" for reading in primary]
        return Verdict("loss", "; ".join(texts) + ".", 0, readings, units)
    if futile := _futility(experiment, primary, units):
        return Verdict("futile", futile, None, readings, units)
    if any(reading.difference.collecting for reading in primary):
        sentence = (
            f"Collecting: nothing is said until each arm has {MIN_UNITS} units that count, or "
            "while all of them are alike."
        )
        return Verdict("go on", sentence, None, readings, units)
    texts = [f"{_versus(r)}: not told apart{_interval(r)}{_needed(r)}" for r in primary]
    return Verdict("go on", "; ".join(texts) + ".", None, readings, units)


def _futility(experiment: Experiment, primary: Sequence[Reading], units: tuple[int, ...]) -> str:
    """Say why going on would not be worth it; empty while it is."""
    policy, sign = experiment.policy, 1 if experiment.primary.better == "higher" else -1
    if policy.max_units is not None and sum(units) >= policy.max_units:
        texts = "; ".join(f"{_versus(r)}: not told apart{_interval(r)}" for r in primary)
        return f"{sum(units)} units, the most this test was to take. {texts}."
    if policy.least_effect is None:
        return ""
    best = [max(sign * r.difference.low, sign * r.difference.high) for r in primary]
    if max(best) >= policy.least_effect:
        return ""
    texts = "; ".join(f"{_versus(r)}{_interval(r)}" for r in primary)
    return f"No treatment is better by {policy.least_effect:g}, the least worth having. {texts}."


def _versus(reading: Reading) -> str:
    return (
        f"{reading.metric} is {reading.treated:.4g} in {reading.arm} and {reading.control:.4g} "
        "in control"
    )


def _needed(reading: Reading) -> str:
    if reading.units_needed is None:
        return ""
    return f"; to tell a difference of this size takes about {reading.units_needed} units"


def _interval(reading: Reading) -> str:
    d = reading.difference
    if d.collecting:
        return ", too few units for an interval"
    return f" (difference {d.value:+.4g}, {d.low:+.4g} to {d.high:+.4g} at every look)"
