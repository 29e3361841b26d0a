"""Ramps: exposures that the server raises by itself, each after some time and some units."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from serving.experiments.design import DesignInvalid, check_share
from serving.experiments.experiment import Experiment, Step

MAX_STEPS = 20
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SHARE = re.compile(r"\d*\.?\d+")
_TIME = re.compile(r"(\d{1,9}(?:\.\d+)?)([smhd])")
_COUNT = re.compile(r"\d{1,12}")


def read_ramp(texts: Sequence[str]) -> tuple[Step, ...]:
    """Read stages written as EXPOSURE[:TIME[:UNITS]], such as 0.02:1h:500. Raises DesignInvalid.

    TIME is how long the stage is held at least, UNITS how many must have taken part by its end.
    """
    steps = tuple(_step(text) for text in texts)
    exposures = [step.exposure for step in steps]
    if len(steps) > MAX_STEPS or sorted(set(exposures)) != exposures:
        raise DesignInvalid(
            f"A ramp has up to {MAX_STEPS} stages, each of a higher exposure than the one before; "
            f"this one has {', '.join(f'{exposure:g}' for exposure in exposures)}."
        )
    return steps


def _step(text: str) -> Step:
    exposure, _, rest = text.partition(":")
    held, _, units = rest.partition(":")
    match = _TIME.fullmatch(held or "0s")
    if match is None or not _SHARE.fullmatch(exposure) or not _COUNT.fullmatch(units or "0"):
        raise DesignInvalid(
            f"{text!r} is no stage of a ramp. Write EXPOSURE:TIME:UNITS, such as 0.02:1h:500: "
            "2 % of the units for an hour at least, and until 500 units took part."
        )
    share = check_share(float(exposure), "exposure")
    return Step(share, float(match[1]) * _UNITS[match[2]], int(units or 0))


def next_step(experiment: Experiment, units: int, now: datetime | None = None) -> Step | None:
    """Return the stage that is due, or None while the present one is to be held.

    `units` is how many took part so far. A person who ramps further than the plan skips stages.
    """
    ramp = experiment.policy.ramp
    later = [step for step in ramp if step.exposure > experiment.exposure]
    if not later or experiment.state != "running" or experiment.held_since is None:
        return None
    held = [step for step in ramp if step.exposure <= experiment.exposure]
    if held:
        since = datetime.fromisoformat(experiment.held_since)
        over = since + timedelta(seconds=held[-1].seconds) <= (now or datetime.now(UTC))
        if not over or units < held[-1].units:
            return None
    return later[0]


def describe_step(step: Step) -> str:
    """Write a stage the way `read_ramp` reads it."""
    return f"{step.exposure:g}:{step.seconds:g}s:{step.units}"
