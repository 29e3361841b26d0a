"""Experiments on disk: their life cycle and log; what was answered is in `answers`."""

import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from registry.adapter import AdapterName
from registry.database import Store, now
from registry.errors import Conflict
from serving.experiments.answers import (
    Counts,
    Coverage,
    Exposure,
    Outcome,
    count_arms,
    cover_arms,
    keyed_share,
    write_answers,
)
from serving.experiments.codec import get_experiment, read_experiment, write_design
from serving.experiments.experiment import Arm, Experiment, Metric, Policy, State
from serving.experiments.feedback import (
    Demonstration,
    comments_of,
    read_demonstrations,
    write_remark,
    write_value,
)
from serving.experiments.layers import Layer, add_layer, read_layer, take_slice
from serving.experiments.outbox import Outbox
from serving.experiments.tables import (
    SCHEMA,
    decisions,
    deliveries,
    experiments,
)

ACTIVE = ("running", "paused")
MAX_OPEN = 100  # experiments of one tenant that are not stopped


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of an experiment's log: what was done, by whom, why, on which numbers."""

    at: str
    action: str
    actor: str
    reason: str
    numbers: dict[str, Any]
    webhook: str = ""  # what became of telling it; empty where nobody was to be told


class Experiments(Store):
    """The experiments of a home, and what their units did."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, "experiments", SCHEMA)
        self.outbox = Outbox(self._database)
        self._writing = threading.Lock()

    @contextmanager
    def _write(self) -> Generator[Connection]:
        """Begin a transaction in turn with the other threads.

        SQLite lets a second writer sleep and look again, longer and longer: beside a stream of
        feedback an exposure would not get in for seconds.
        """
        with self._writing, self._database.write() as connection:
            yield connection

    # Life cycle

    def create(
        self,
        name: AdapterName,
        arms: Sequence[Arm],
        metrics: Sequence[Metric],
        policy: Policy,
        *,
        layer: tuple[str, float] | None = None,
        actor: str,
    ) -> Experiment:
        """Write the design of an experiment down. It runs when it is started.

        `layer` is the name of one and the share of its units that the experiment gets. Raises
        Conflict when the tenant has MAX_OPEN of them already or the layer has no such part free.
        """
        row = {
            "id": f"exp_{secrets.token_hex(6)}",
            "namespace": name.namespace,
            "name": name.name,
            "state": "draft",
            "exposure": 0.0,
            "generation": 1,
            "created_at": now(),
        }
        salt = secrets.token_hex(16)
        with self._write() as connection:
            _refuse_too_many(connection, name.namespace)
            part = take_slice(connection, name.namespace, *layer) if layer else None
            design = write_design(arms, metrics, policy, part, salt)
            connection.execute(insert(experiments).values(**row, design=design))
            _log(connection, row["id"], "create", actor, "", {})
            return get_experiment(connection, row["id"])

    def get(self, experiment_id: str) -> Experiment:
        """Raises NotFound."""
        with self._database.read() as connection:
            return get_experiment(connection, experiment_id)

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
            return [read_experiment(row) for row in connection.execute(query)]

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
        with self._write() as connection:
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
                    held_since=now() if state == "running" else experiment.held_since,
                    ended_at=now() if state == "stopped" else None,
                )
            )
            if changed.rowcount == 0:
                raise Conflict(f"{experiment.id} was changed meanwhile. Look again, then decide.")
            _log(connection, experiment.id, action, actor, reason, numbers or {})
            if also is not None:
                also()
            return get_experiment(connection, experiment.id)

    def decisions(self, experiment_id: str) -> list[Decision]:
        """Return the log, oldest first. Raises NotFound."""
        told = decisions.outerjoin(deliveries, deliveries.c.decision == decisions.c.seq)
        query = (
            select(decisions, deliveries.c.state, deliveries.c.error)
            .select_from(told)
            .where(decisions.c.experiment == experiment_id)
            .order_by(decisions.c.seq)
        )
        with self._database.read() as connection:
            get_experiment(connection, experiment_id)
            return [
                Decision(
                    row.at,
                    row.action,
                    row.actor,
                    row.reason,
                    row.numbers,
                    ": ".join(filter(None, (row.state, row.error))),
                )
                for row in connection.execute(query)
            ]

    def add_layer(self, namespace: str, name: str, holdout: float) -> Layer:
        """Raises Conflict."""
        with self._write() as connection:
            return add_layer(connection, namespace, name, holdout)

    def layer(self, namespace: str, name: str) -> Layer:
        """Raises NotFound."""
        with self._database.read() as connection:
            return read_layer(connection, namespace, name)

    # What happened

    @contextmanager
    def recording(self) -> Generator[Callable[[Sequence[Exposure], Sequence[Outcome]], None]]:
        """Wait for the database, then take rows; they are durable when the block has ended.

        Idempotent: a row that is there stays.
        """
        with self._write() as connection:
            yield partial(write_answers, connection)

    def record(self, exposed: Sequence[Exposure], ended: Sequence[Outcome]) -> None:
        """Write many rows in one transaction; durable when this returns. Idempotent."""
        with self.recording() as write:
            write(exposed, ended)

    def give_feedback(
        self, request_id: str, metric: str, value: float, *, tenant: str | None, key: str | None
    ) -> bool:
        """Record what came of an answer, however late; the last value counts, all are kept.

        With `key`, sending the metric again changes nothing: False. `tenant` None is the operator.
        Raises NotFound for an answer that is in no experiment, or is another tenant's.
        """
        with self._write() as connection:
            return write_value(connection, request_id, metric, value, tenant=tenant, key=key)

    def give_words(
        self,
        request_id: str,
        kind: str,
        text: str,
        messages: Sequence[dict[str, str]],
        *,
        tenant: str | None,
        key: str | None,
    ) -> bool:
        """Record a comment, or a demonstration with what was asked. As `give_feedback`."""
        with self._write() as connection:
            return write_remark(
                connection, request_id, kind, text, messages, tenant=tenant, key=key
            )

    def demonstrations(self, name: AdapterName, after: int = 0) -> list[Demonstration]:
        """Return the next ones after a `seq`, a page of them; none at the end."""
        with self._database.read() as connection:
            return read_demonstrations(connection, name, after)

    def comments(self, experiment: Experiment) -> list[dict[str, Any]]:
        with self._database.read() as connection:
            return comments_of(connection, experiment)

    def counts(self, experiment: Experiment) -> list[Counts]:
        """Return what every arm adds up to, one term for each unit."""
        with self._database.read() as connection:
            return count_arms(connection, experiment)

    def coverage(self, experiment: Experiment) -> list[Coverage]:
        """Return, for every arm, how much of what was to be known of its answers is."""
        with self._database.read() as connection:
            return cover_arms(connection, experiment)

    def keyed_share(self, experiment: Experiment) -> float:
        """Return the share of answers whose unit was named by the client; 1 before the first."""
        with self._database.read() as connection:
            return keyed_share(connection, experiment)


def _refuse_too_many(connection: Connection, namespace: str) -> None:
    query = select(func.count()).where(
        experiments.c.namespace == namespace, experiments.c.state != "stopped"
    )
    if connection.execute(query).scalar_one() >= MAX_OPEN:
        raise Conflict(
            f"{namespace} has {MAX_OPEN} experiments that are not stopped. Stop some of them first."
        )


def _refuse_second(connection: Connection, experiment: Experiment) -> None:
    """Two experiments on one adapter would be in each other's traffic, but for those of a layer."""
    query = select(experiments).where(
        experiments.c.namespace == experiment.name.namespace,
        experiments.c.name == experiment.name.name,
        experiments.c.state.in_(ACTIVE),
        experiments.c.id != experiment.id,
    )
    for other in map(read_experiment, connection.execute(query)):
        if _layer(other) is None or _layer(other) != _layer(experiment):
            raise Conflict(
                f"{other.id} splits the traffic of {experiment.name} or is paused. Stop it, or "
                "make both in one layer."
            )


def _layer(experiment: Experiment) -> str | None:
    return experiment.slice.layer if experiment.slice else None


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
