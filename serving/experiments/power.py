"""Before it starts: how many units an experiment takes to show an effect, and how long that is."""

import math
from dataclasses import dataclass

from serving.experiments.design import DesignInvalid
from serving.experiments.experiment import Experiment, Step
from serving.experiments.sequential import units_for

POWER = 0.8
DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an effect of this size would take to be seen four times of five."""

    effect: float
    units: int  # of all arms together
    days: float

    @property
    def sentence(self) -> str:
        return (
            f"To show a difference of {self.effect:g} four times of five takes about "
            f"{self.units} units in all arms, {self.days:.3g} days at this traffic."
        )


def estimate(
    experiment: Experiment,
    *,
    units_per_day: float,
    effect: float | None = None,
    baseline: float | None = None,
    deviation: float | None = None,
) -> Estimate:
    """Return what the primary metric takes, for the smallest treatment against the control.

    `effect` is the policy's least one unless given; `baseline` the control's share of a binary
    metric, `deviation` a unit's standard deviation of any other; `units_per_day` those that the
    adapter sees, of which the slice and the exposures take their part. Raises DesignInvalid.
    """
    effect = experiment.policy.least_effect if effect is None else effect
    if not effect or not 0 < effect < math.inf or not 0 < units_per_day < math.inf:
        raise DesignInvalid("The effect and the units of a day have to be given, above 0.")
    binary = experiment.primary.kind == "binary"
    if (baseline is None) == binary or (binary and deviation is not None):
        raise DesignInvalid("Give the baseline of a binary metric; of others, the deviation.")
    deviation = deviation if baseline is None else _of_share(baseline, effect)
    if not deviation or not 0 < deviation < math.inf:
        raise DesignInvalid("The deviation of a unit has to be given, above 0.")
    shares = [arm.share for arm in experiment.arms]
    pair = shares[0] + min(shares[1:])
    alpha = experiment.policy.alpha / (len(shares) - 1)
    needed = units_for(effect, deviation, min(shares[1:]) / pair, alpha, POWER)
    units = math.ceil(needed / pair)
    part = experiment.slice.high - experiment.slice.low if experiment.slice else 1.0
    return Estimate(effect, units, _days(experiment, units, units_per_day * part))


def _of_share(baseline: float, effect: float) -> float:
    """Return the standard deviation of a share's unit, the larger one of the two arms."""
    if not 0 < baseline < 1:
        raise DesignInvalid(f"The baseline is {baseline}; it is a share between 0 and 1.")
    shares = (baseline, min(max(baseline + effect, 0.0), 1.0), min(max(baseline - effect, 0), 1))
    return max(math.sqrt(share * (1 - share)) for share in shares)


def _days(experiment: Experiment, units: int, per_day: float) -> float:
    """Walk through the ramp: each stage lasts its time and its units, the last one what is left.

    New units come at a steady rate: where the same ones come back every day, it takes longer.
    """
    steps = experiment.policy.ramp or (Step(experiment.exposure or 1.0),)
    days, had = 0.0, 0.0
    for step in steps[:-1]:
        rate = per_day * step.exposure
        held = max(step.seconds / DAY, max(step.units - had, 0.0) / rate)
        if had + held * rate >= units:
            return days + max(units - had, 0.0) / rate
        days, had = days + held, had + held * rate
    return days + (units - had) / (per_day * steps[-1].exposure)
