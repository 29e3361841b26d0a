"""Which decisions the webhook has been told, and which wait. Kept with the decisions themselves.

Decisions are told in their order, one at a time. A server takes one for some time; when it dies,
the next takes it over, so a decision may be told twice and is never lost.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, select, update

from registry.database import Database, now
from serving.experiments.tables import decisions, deliveries, experiments

MAX_WAITING = 1000  # older ones are passed over

Ending = Literal["delivered", "given up"]


@dataclass(frozen=True, slots=True)
class Message:
    """One decision, as the webhook is told it."""

    seq: int
    attempts: int  # that were made before
    data: dict[str, Any]


class Outbox:
    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self) -> None:
        """Pass over what was decided before there was a webhook."""
        with self._database.write() as connection:
            if connection.execute(select(deliveries.c.decision)).first() is None:
                _note(connection, _newest(connection), "before", 0.0)

    def take(self, seconds: float) -> Message | None:
        """Return the oldest decision that waits and hold it so long; None when none does."""
        with self._database.read() as connection:
            if _next(connection) is None:
                return None
        with self._database.write() as connection:
            seq = _next(connection)
            if seq is None:
                return None
            until = time.time() + seconds
            again = update(deliveries).where(deliveries.c.decision == seq).values(until=until)
            if connection.execute(again).rowcount == 0:
                _note(connection, seq, "sending", until)
            return _message(connection, seq)

    def failed(self, seq: int, error: str, seconds: float) -> None:
        """Note an attempt that failed, and hold the decision for the next one."""
        self._change(seq, "sending", error, time.time() + seconds)

    def end(self, seq: int, state: Ending, error: str = "") -> None:
        self._change(seq, state, error, 0.0)

    def _change(self, seq: int, state: str, error: str, until: float) -> None:
        made = deliveries.c.attempts + 1
        values = {"state": state, "error": error, "until": until, "attempts": made, "at": now()}
        with self._database.write() as connection:
            connection.execute(
                update(deliveries).where(deliveries.c.decision == seq).values(**values)
            )


def _next(connection: Connection) -> int | None:
    """Return the first decision after all that were told, unless somebody is telling it now."""
    last = connection.execute(
        select(deliveries).order_by(deliveries.c.decision.desc()).limit(1)
    ).first()
    if last is None:
        return None
    if last.state == "sending":
        return last.decision if last.until < time.time() else None
    first = max(last.decision, _newest(connection) - MAX_WAITING)
    return connection.execute(
        select(func.min(decisions.c.seq)).where(decisions.c.seq > first)
    ).scalar()


def _newest(connection: Connection) -> int:
    return connection.execute(select(func.max(decisions.c.seq))).scalar() or 0


def _note(connection: Connection, seq: int, state: str, until: float) -> None:
    row = {"decision": seq, "state": state, "attempts": 0, "error": "", "until": until}
    connection.execute(insert(deliveries).values(**row, at=now()))


def _message(connection: Connection, seq: int) -> Message:
    query = (
        select(
            decisions,
            experiments.c.namespace,
            experiments.c.name,
            deliveries.c.attempts,
        )
        .join(experiments, experiments.c.id == decisions.c.experiment)
        .join(deliveries, deliveries.c.decision == decisions.c.seq)
        .where(decisions.c.seq == seq)
    )
    row = connection.execute(query).one()
    data = {
        "experiment": row.experiment,
        "adapter": f"{row.namespace}/{row.name}",
        "action": row.action,
        "actor": row.actor,
        "reason": row.reason,
        "numbers": row.numbers,
        "at": row.at,
    }
    return Message(seq, row.attempts, data)
