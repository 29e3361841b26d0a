"""The database of limits and usage: what was set, by whom, and what was used."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.database import Store, now
from serving.tenants.limit import Limit, Subject
from serving.tenants.rollup import RollUp
from serving.tenants.tables import SCHEMA, buckets, limit_events, limits, usage
from serving.tenants.usage import MOST_ROWS, By, Span, TooManyRows, UsageRow

_FIELDS = tuple(Limit.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class LimitEvent:
    """One change of a limit. None before or after: there was none."""

    at: str
    subject: Subject
    before: Limit | None
    after: Limit | None
    actor: str
    reason: str


class Ledger(Store):
    """The limits and the usage of a home."""

    def __init__(self, home: Path) -> None:
        # Not synced at every commit: a killed process loses nothing by it, and `checkpoint`
        # bounds what a power cut takes.
        super().__init__(home, "usage", SCHEMA, synchronous="NORMAL")

    # Limits

    def set_limit(
        self, subject: Subject, values: Mapping[str, int | None], *, actor: str, reason: str
    ) -> Limit:
        """Replace these fields of a limit, with a line in its history.

        None takes one away. Raises LimitInvalid.
        """
        with self._database.write() as connection:
            before = _limit(connection, subject)
            after = (before or Limit()).changed(values)
            row = {"tenant": subject.tenant, "name": subject.name, "set_at": now()}
            put = upsert(limits).values(**row, **asdict(after))
            replaced = {**asdict(after), "set_at": put.excluded.set_at}
            connection.execute(put.on_conflict_do_update(set_=replaced))
            _log(connection, subject, before, after, actor, reason)
        return after

    def clear_limit(self, subject: Subject, *, actor: str, reason: str) -> bool:
        """Take a limit away; tell whether there was one."""
        with self._database.write() as connection:
            before = _limit(connection, subject)
            if before is None:
                return False
            for table in (limits, buckets):
                same = (table.c.tenant == subject.tenant) & (table.c.name == subject.name)
                connection.execute(delete(table).where(same))
            _log(connection, subject, before, None, actor, reason)
        return True

    def limits(self, tenant: str | None = None) -> dict[Subject, Limit]:
        """Return the limits that are set, of one tenant or of all."""
        query = select(limits).order_by(limits.c.tenant, limits.c.name)
        if tenant is not None:
            query = query.where(limits.c.tenant == tenant)
        with self._database.read() as connection:
            return {Subject(r.tenant, r.name): _limit_of(r) for r in connection.execute(query)}

    def limit_history(self, tenant: str | None = None) -> list[LimitEvent]:
        """Return who set which limit, when and why; oldest first."""
        query = select(limit_events).order_by(limit_events.c.seq)
        if tenant is not None:
            query = query.where(limit_events.c.tenant == tenant)
        with self._database.read() as connection:
            return [
                LimitEvent(
                    r.at,
                    Subject(r.tenant, r.name),
                    _logged(r.before),
                    _logged(r.after),
                    r.actor,
                    r.reason,
                )
                for r in connection.execute(query)
            ]

    # Usage

    @contextmanager
    def writing(self) -> Generator[RollUp]:
        """Write usage in one transaction; the write lock is held from the start."""
        with self._database.write() as connection:
            yield RollUp(connection)

    def news(self, server: str) -> tuple[bool, int]:
        """Tell whether another server of this home runs, and how often limits were changed."""
        with self._database.read() as connection:
            reader = RollUp(connection)
            return bool(reader.others(server)), reader.changes()

    def checkpoint(self) -> None:
        """Sync what was committed to the disk. Waits for nobody."""
        self._database.checkpoint()

    def usage(self, span: Span, by: By, tenant: str | None = None) -> list[UsageRow]:
        """Return what was used, in the order of time, tenant, name and version.

        Raises TooManyRows for what nobody could read at once.
        """
        with self._database.read() as connection:
            rows = [UsageRow(*row) for row in connection.execute(_sums(span, by, tenant))]
        if len(rows) > MOST_ROWS:
            raise TooManyRows(
                f"This is more than {MOST_ROWS} rows. Ask for a shorter time, for one tenant, or "
                "by day or version."
            )
        return rows


def _sums(span: Span, by: By, tenant: str | None) -> Any:
    length = {"hour": 13, "day": 10, "version": 0}[by]
    time = func.substr(usage.c.hour, 1, length)
    dimensions = (time, usage.c.tenant, usage.c.name, usage.c.digest)
    query = (
        select(
            time,
            usage.c.tenant,
            usage.c.name,
            func.max(usage.c.version),
            usage.c.digest,
            func.sum(usage.c.answers),
            func.sum(usage.c.prompt_tokens),
            func.sum(usage.c.completion_tokens),
        )
        .where(
            usage.c.hour >= span.first,
            func.substr(usage.c.hour, 1, len(span.last)) <= span.last,
        )
        .group_by(*dimensions)
        .order_by(*dimensions)
        .limit(MOST_ROWS + 1)
    )
    return query if tenant is None else query.where(usage.c.tenant == tenant)


def _limit(connection: Connection, subject: Subject) -> Limit | None:
    query = select(limits).where(limits.c.tenant == subject.tenant, limits.c.name == subject.name)
    row = connection.execute(query).first()
    return _limit_of(row) if row else None


def _limit_of(row: Row[Any]) -> Limit:
    return Limit(*(getattr(row, name) for name in _FIELDS))


def _logged(value: dict[str, int | None] | None) -> Limit | None:
    return None if value is None else Limit(**value)


def _log(
    connection: Connection,
    subject: Subject,
    before: Limit | None,
    after: Limit | None,
    actor: str,
    reason: str,
) -> None:
    row = {
        "tenant": subject.tenant,
        "name": subject.name,
        "before": asdict(before) if before else None,
        "after": asdict(after) if after else None,
    }
    connection.execute(insert(limit_events).values(**row, actor=actor, reason=reason, at=now()))
