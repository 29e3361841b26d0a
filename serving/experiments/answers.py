"""Answers of units in experiments: who was exposed, how it ended, and what that adds up to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, func, select
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.database import now
from serving.experiments.experiment import Experiment
from serving.experiments.sequential import Sums
from serving.experiments.sums import sums_of
from serving.experiments.tables import exposures, feedback, outcomes


@dataclass(frozen=True, slots=True)
class Exposure:
    """One answer that a unit of an experiment is about to get."""

    request_id: str
    experiment: str
    arm: int
    unit: str
    tenant: str
    keyed: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exposed answer ended."""

    request_id: str
    failed: bool
    seconds: float
    tokens: int
    prompt_tokens: int = 0
    malformed: bool = False  # it should have been JSON, and was not


@dataclass(frozen=True, slots=True)
class Counts:
    """The sums of one arm: how many units and answers, and each metric by its name."""

    units: int
    answers: int
    metrics: dict[str, Sums]


@dataclass(frozen=True, slots=True)
class Coverage:
    """What is known of one arm's answers."""

    unended: int  # no outcome: still running, or the server died
    rated: float  # share that got a feedback value


def write_answers(
    connection: Connection, exposed: Sequence[Exposure], ended: Sequence[Outcome]
) -> None:
    if exposed:
        rows = [{**asdict(row), "at": now()} for row in exposed]
        connection.execute(upsert(exposures).on_conflict_do_nothing(), rows)
    if ended:
        rows = [asdict(row) for row in ended]
        connection.execute(upsert(outcomes).on_conflict_do_nothing(), rows)


def count_arms(connection: Connection, experiment: Experiment) -> list[Counts]:
    sizes = _sizes(connection, experiment)
    metrics = {m.name: sums_of(connection, experiment, m) for m in experiment.metrics}
    return [
        Counts(*sizes.get(arm, (0, 0)), {name: by[arm] for name, by in metrics.items()})
        for arm in range(len(experiment.arms))
    ]


def _sizes(connection: Connection, experiment: Experiment) -> dict[int, tuple[int, int]]:
    query = (
        select(
            exposures.c.arm,
            func.count(func.distinct(exposures.c.unit)),
            func.count(),
        )
        .where(exposures.c.experiment == experiment.id)
        .group_by(exposures.c.arm)
    )
    return {arm: (units, answers) for arm, units, answers in connection.execute(query)}


def cover_arms(connection: Connection, experiment: Experiment) -> list[Coverage]:
    rated = select(feedback.c.request_id).where(feedback.c.request_id == exposures.c.request_id)
    ended = exposures.outerjoin(outcomes, outcomes.c.request_id == exposures.c.request_id)
    unended = func.count() - func.count(outcomes.c.request_id)
    query = (
        select(exposures.c.arm, unended, func.avg(rated.exists()))
        .select_from(ended)
        .where(exposures.c.experiment == experiment.id)
        .group_by(exposures.c.arm)
    )
    found = {arm: Coverage(n, float(share)) for arm, n, share in connection.execute(query)}
    return [found.get(arm, Coverage(0, 0.0)) for arm in range(len(experiment.arms))]


def keyed_share(connection: Connection, experiment: Experiment) -> float:
    query = select(func.avg(exposures.c.keyed)).where(exposures.c.experiment == experiment.id)
    share = connection.execute(query).scalar()
    return 1.0 if share is None else float(share)
