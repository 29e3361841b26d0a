"""An experiment in a store, and what it is told of answers."""

from registry.adapter import AdapterName
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.design import make_metrics
from serving.experiments.experiment import Arm, Experiment, Policy
from serving.experiments.moves import move
from serving.experiments.store import Experiments

NAME = AdapterName("acme", "support")
ARMS = (Arm("control", 0.5, NAME, 1, "a" * 64), Arm("treatment", 0.5, NAME, 2, "b" * 64))


def created(store: Experiments, arms: tuple[Arm, ...] = ARMS, **changes: object) -> Experiment:
    metrics = make_metrics("solved:binary", ["errors", "angry:binary:lower"], ["stars:average"])
    policy = Policy(**changes)  # type: ignore[arg-type]  # as the tests give them
    return store.create(NAME, arms, metrics, policy, actor="test")


def started(store: Experiments, exposure: float = 1.0, **changes: object) -> Experiment:
    experiment = created(store, **changes)  # type: ignore[arg-type]  # passed on
    return move(store, experiment, "start", exposure=exposure, actor="test", reason="go")


def expose(
    store: Experiments, experiment: Experiment, arm: int, unit: str, answers: int = 1
) -> list[str]:
    ids = [f"req_{experiment.id}_{arm}_{unit}_{number}" for number in range(answers)]
    rows = [Exposure(i, experiment.id, arm, unit, "acme", True) for i in ids]
    store.record(rows, [Outcome(i, False, 1.0, 10) for i in ids])
    return ids


def feed(
    store: Experiments, request_id: str, metric: str, value: float, key: str | None = None
) -> bool:
    return store.give_feedback(request_id, metric, value, tenant="acme", key=key)
