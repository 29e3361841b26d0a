"""Experiments on disk: their design and state, who was exposed, what came of it."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from filelock import FileLock
from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.adapter import AdapterName
from registry.database import Database, now
from registry.errors import Conflict, NotFound, WardrobeError
from serving.experiments.experiment import BUILT_IN, Arm, Experiment, Metric, State
from serving.experiments.sequential import Sums
from serving.experiments.sums import sums_of
from serving.experiments.tables import (
    SCHEMA,
    decisions,
    experiments,
    exposures,
    feedback,
    feedback_log,
    outcomes,
)

ACTIVE = ("running", "paused")
MAX_OPEN = 100  # experiments of one tenant that are not stopped


class ExperimentNotFound(NotFound):
    """No experiment, or none that this caller may know of."""

    code = "experiment_not_found"


class FeedbackInvalid(WardrobeError):
    code = "feedback_invalid"


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


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of an experiment's log: what was done, by whom, why, on which numbers."""

    at: str
    action: str
    actor: str
    reason: str
    numbers: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Counts:
    """The sums of one arm: how many units and answers, and each metric by its name."""

    units: int
    answers: int
    metrics: dict[str, Sums]


class Experiments:
    """The store. Safe for threads and for several processes at once; close it after use."""

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".experiments.lock"):
            self._database = Database(f"sqlite:///{home / 'experiments.sqlite'}", SCHEMA)
            self._database.prepare()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Life cycle

    def create(
        self,
        name: AdapterName,
        arms: Sequence[Arm],
        metrics: Sequence[Metric],
        *,
        alpha: float,
        on_win: str,
        blind: bool,
        actor: str,
    ) -> Experiment:
        """Write the design of an experiment down. It runs when it is started.

        Raises Conflict when the tenant has MAX_OPEN of them already.
        """
        design = {
            "arms": [_plain_arm(arm) for arm in arms],
            "metrics": [asdict(metric) for metric in metrics],
            "alpha": alpha,
            "on_win": on_win,
            "blind": blind,
            "salt": secrets.token_hex(16),
        }
        row = {
            "id": f"exp_{secrets.token_hex(6)}",
            "namespace": name.namespace,
            "name": name.name,
            "design": design,
            "state": "draft",
            "exposure": 0.0,
            "generation": 1,
            "created_at": now(),
        }
        with self._database.write() as connection:
            _refuse_too_many(connection, name.namespace)
            connection.execute(insert(experiments).values(**row))
            _log(connection, row["id"], "create", actor, "", {})
            return _get(connection, row["id"])

    def get(self, experiment_id: str) -> Experiment:
        """Raises NotFound."""
        with self._database.read() as connection:
            return _get(connection, experiment_id)

    def find(
        self, states: Sequence[State] | None = None, namespace: str | None = None
    ) -> list[Experiment]:
        """Return experiments, oldest first; those of one namespace where it is given."""
        query = select(experiments).order_by(experiments.c.created_at, experiments.c.id)
        if states is not None:
            query = query.where(experiments.c.state.in_(states))
        if namespace is not None:
            query = query.where(experiments.c.namespace == namespace)
        with self._database.read() as connection:
            return [_experiment(row) for row in connection.execute(query)]

    def move(
        self,
        experiment: Experiment,
        state: State,
        *,
        exposure: float | None = None,
        action: str,
        actor: str,
        reason: str,
        numbers: dict[str, Any] | None = None,
        also: Callable[[], None] | None = None,
    ) -> Experiment:
        """Change state or exposure, with its line in the log.

        Compare-and-set: of two that decide at once, one gets Conflict. Raises Conflict also when
        another experiment splits the same adapter. `also` is done once nobody else can move the
        experiment; what it raises undoes the move.
        """
        after = exposure if exposure is not None else experiment.exposure
        with self._database.write() as connection:
            if state in ACTIVE:
                _refuse_second(connection, experiment)
            changed = connection.execute(
                update(experiments)
                .where(
                    experiments.c.id == experiment.id,
                    experiments.c.generation == experiment.generation,
                )
                .values(
                    state=state,
                    exposure=after,
                    generation=experiment.generation + 1,
                    started_at=experiment.started_at or (now() if state == "running" else None),
                    ended_at=now() if state == "stopped" else None,
                )
            )
            if changed.rowcount == 0:
                raise Conflict(f"{experiment.id} was changed meanwhile. Look again, then decide.")
            _log(connection, experiment.id, action, actor, reason, numbers or {})
            if also is not None:
                also()
            return _get(connection, experiment.id)

    def decisions(self, experiment_id: str) -> list[Decision]:
        """Return the log, oldest first. Raises NotFound."""
        query = (
            select(decisions)
            .where(decisions.c.experiment == experiment_id)
            .order_by(decisions.c.seq)
        )
        with self._database.read() as connection:
            _get(connection, experiment_id)
            return [
                Decision(row.at, row.action, row.actor, row.reason, row.numbers)
                for row in connection.execute(query)
            ]

    # What happened

    def record(self, exposed: Sequence[Exposure], ended: Sequence[Outcome]) -> None:
        """Write many rows in one transaction; durable when this returns. Idempotent."""
        with self._database.write() as connection:
            if exposed:
                rows = [{**asdict(row), "at": now()} for row in exposed]
                connection.execute(upsert(exposures).on_conflict_do_nothing(), rows)
            if ended:
                rows = [asdict(row) for row in ended]
                connection.execute(upsert(outcomes).on_conflict_do_nothing(), rows)

    def give_feedback(
        self, request_id: str, metric: str, value: float, *, tenant: str | None, key: str | None
    ) -> bool:
        """Record what came of an answer, however late; the last value counts, all are kept.

        With `key`, sending the metric again changes nothing: False. `tenant` None is the operator.
        Raises NotFound for an answer that is in no experiment, or is another tenant's.
        """
        with self._database.write() as connection:
            experiment = _experiment_of(connection, request_id, tenant)
            _check_metric(experiment, metric, value)
            once = {"request_id": request_id, "metric": metric, "value": value, "at": now()}
            written = connection.execute(
                upsert(feedback_log).on_conflict_do_nothing().values(**once, key=key)
            )
            if written.rowcount == 0:
                return False
            latest = upsert(feedback).values(**once)
            same = [feedback.c.request_id, feedback.c.metric]
            replaced = {"value": latest.excluded.value, "at": latest.excluded.at}
            connection.execute(latest.on_conflict_do_update(index_elements=same, set_=replaced))
            return True

    def counts(self, experiment: Experiment) -> list[Counts]:
        """Return what every arm adds up to, one term for each unit."""
        with self._database.read() as connection:
            sizes = _sizes(connection, experiment)
            metrics = {m.name: sums_of(connection, experiment, m) for m in experiment.metrics}
        return [
            Counts(*sizes.get(arm, (0, 0)), {name: by[arm] for name, by in metrics.items()})
            for arm in range(len(experiment.arms))
        ]

    def keyed_share(self, experiment: Experiment) -> float:
        """Return the share of answers whose unit was named by the client; 1 before the first."""
        query = select(func.avg(exposures.c.keyed)).where(exposures.c.experiment == experiment.id)
        with self._database.read() as connection:
            share = connection.execute(query).scalar()
        return 1.0 if share is None else float(share)


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


def _refuse_too_many(connection: Connection, namespace: str) -> None:
    query = select(func.count()).where(
        experiments.c.namespace == namespace, experiments.c.state != "stopped"
    )
    if connection.execute(query).scalar_one() >= MAX_OPEN:
        raise Conflict(
            f"{namespace} has {MAX_OPEN} experiments that are not stopped. Stop some of them first."
        )


def _refuse_second(connection: Connection, experiment: Experiment) -> None:
    """Two experiments on one adapter would be in each other's traffic."""
    query = select(experiments.c.id).where(
        experiments.c.namespace == experiment.name.namespace,
        experiments.c.name == experiment.name.name,
        experiments.c.state.in_(ACTIVE),
        experiments.c.id != experiment.id,
    )
    if other := connection.execute(query).scalar():
        raise Conflict(f"{other} splits the traffic of {experiment.name} or is paused. Stop it.")


def _experiment_of(connection: Connection, request_id: str, tenant: str | None) -> Experiment:
    query = select(exposures).where(exposures.c.request_id == request_id)
    row = connection.execute(query).first()
    if row is None or (tenant is not None and row.tenant != tenant):
        raise ExperimentNotFound(f"No experiment knows an answer {request_id!r}.")
    return _get(connection, row.experiment)


def _check_metric(experiment: Experiment, name: str, value: float) -> None:
    taken = {m.name: m for m in experiment.metrics if m.name not in BUILT_IN}
    if name not in taken:
        known = ", ".join(taken) or "none"
        raise ExperimentNotFound(f"{experiment.id} takes no feedback {name!r}. It takes: {known}.")
    if taken[name].kind == "binary" and value not in (0.0, 1.0):
        raise FeedbackInvalid(f"{name} is 0 or 1, and {value} was sent.")


def _get(connection: Connection, experiment_id: str) -> Experiment:
    query = select(experiments).where(experiments.c.id == experiment_id)
    row = connection.execute(query).first()
    if row is None:
        raise no_experiment(experiment_id)
    return _experiment(row)


def no_experiment(experiment_id: str) -> ExperimentNotFound:
    return ExperimentNotFound(
        f"There is no experiment {experiment_id!r}. See: wardrobe experiment list"
    )


def _experiment(row: Row[Any]) -> Experiment:
    design = row.design
    return Experiment(
        id=row.id,
        name=AdapterName(row.namespace, row.name),
        arms=tuple(_arm(arm) for arm in design["arms"]),
        metrics=tuple(msgspec.convert(metric, Metric) for metric in design["metrics"]),
        alpha=design["alpha"],
        on_win=design["on_win"],
        blind=design["blind"],
        salt=design["salt"],
        state=row.state,
        exposure=row.exposure,
        generation=row.generation,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )


def _plain_arm(arm: Arm) -> dict[str, Any]:
    return {**asdict(arm), "name": str(arm.name) if arm.name else None}


def _arm(value: dict[str, Any]) -> Arm:
    name = AdapterName.parse(value["name"]) if value["name"] else None
    return replace(msgspec.convert({**value, "name": None}, Arm), name=name)


def _log(
    connection: Connection,
    experiment_id: str,
    action: str,
    actor: str,
    reason: str,
    numbers: dict[str, Any],
) -> None:
    row = {"experiment": experiment_id, "action": action, "actor": actor, "reason": reason}
    connection.execute(insert(decisions).values(**row, numbers=numbers, at=now()))
