"""What people may do with an experiment, and in which state."""

from registry.errors import Conflict
from serving.experiments.design import DesignInvalid, check_share
from serving.experiments.experiment import Experiment, State
from serving.experiments.store import Experiments

# action → (states it is for, the state after it)
MOVES: dict[str, tuple[tuple[State, ...], State]] = {
    "start": (("draft", "paused"), "running"),
    "ramp": (("running",), "running"),  # what was paused for a reason is started again, not ramped
    "pause": (("running",), "paused"),
    "stop": (("draft", "running", "paused"), "stopped"),
}
MAX_REASON = 2000


def move(
    store: Experiments,
    experiment: Experiment,
    action: str,
    *,
    exposure: float | None,
    actor: str,
    reason: str,
) -> Experiment:
    """Start, ramp, pause or stop. Raises Conflict for the wrong state, DesignInvalid.

    A ramp only goes up: units that were exposed stay exposed, and none changes its arm.
    """
    if not 1 <= len(reason.strip()) <= MAX_REASON:
        raise DesignInvalid(
            f"A move of an experiment needs a reason of 1 to {MAX_REASON} characters."
        )
    states, after = MOVES[action]
    if experiment.state not in states:
        raise Conflict(
            f"{experiment.id} is {experiment.state}; {action} is for one that is "
            f"{' or '.join(states)}."
        )
    if action in ("pause", "stop"):
        if exposure is not None:
            raise DesignInvalid(f"{action} takes no exposure.")
    else:
        exposure = _exposure(experiment, action, exposure)
    return store.move(
        experiment, after, exposure=exposure, action=action, actor=actor, reason=reason
    )


def _exposure(experiment: Experiment, action: str, wanted: float | None) -> float:
    if wanted is None and action == "start" and not experiment.exposure and experiment.policy.ramp:
        wanted = experiment.policy.ramp[0].exposure
    if wanted is None and (action == "ramp" or not experiment.exposure):
        raise DesignInvalid(f"{action} needs an exposure: the share of units that take part.")
    exposure = experiment.exposure if wanted is None else check_share(wanted, "exposure")
    if exposure < experiment.exposure:
        raise DesignInvalid(
            f"The exposure is {experiment.exposure:g} and can only grow: units that saw an arm "
            "would lose it. Pause or stop the experiment instead."
        )
    return exposure
