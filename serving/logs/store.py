"""The request log on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, func, select, text
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.adapter import check_tenant
from registry.database import Store
from registry.errors import NotFound, WardrobeError
from serving.logs.entry import DEFAULT_DAYS, Contents, Entry, LogSettings
from serving.logs.redact import Redactor
from serving.logs.tables import SCHEMA, contents, requests, settings

MAX_ROWS = 5_000_000  # beyond it the oldest go, however young: the disk is not the client's to fill
MAX_DAYS = 3650
BATCH = 1000  # rows deleted in one transaction, so that no writer waits long
PAGE = 1000


class RequestNotLogged(NotFound):
    """No such request, or none that this caller may know of."""

    code = "request_not_logged"


class LogSettingInvalid(WardrobeError):
    code = "log_setting_invalid"


@dataclass(frozen=True, slots=True)
class Logged:
    """One request as it was written down. `seq` grows with every request that ended."""

    seq: int
    entry: Entry
    contents: Contents | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which requests to read; None is any."""

    tenant: str | None = None
    adapter: str | None = None  # NAMESPACE/NAME, or the base's id
    request_id: str | None = None
    since: str | None = None  # ISO 8601, UTC
    failed: bool = False  # only what did not end normally
    with_contents: bool = False  # only where prompt and answer are kept

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = [
            requests.c[column] == value
            for column in ("tenant", "adapter", "request_id")
            if (value := getattr(self, column)) is not None
        ]
        if self.since is not None:
            found.append(requests.c.at >= self.since)
        if self.failed:
            found.append((requests.c.status >= 400) | (requests.c.outcome != ""))
        if self.with_contents:
            found.append(contents.c.request_id.is_not(None))
        return found


class Logs(Store):
    """The request log of a home."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, "logs", SCHEMA)

    # How each tenant is logged

    def settings(self) -> dict[str, LogSettings]:
        """Return tenant → settings, of those that have any."""
        with self._database.read() as connection:
            return _settings(connection)

    def set(self, wanted: LogSettings) -> LogSettings:
        """Write a tenant's settings. With `sample` 0 all that was said by it is deleted, too.

        Raises LogSettingInvalid and PatternInvalid.
        """
        check_tenant(wanted.tenant)
        if not 0 <= wanted.sample <= 1:
            raise LogSettingInvalid(f"The sample is {wanted.sample}; it is a share, 0 to 1.")
        if not 1 <= wanted.keep_days <= MAX_DAYS:
            raise LogSettingInvalid(f"{wanted.keep_days} days; 1 to {MAX_DAYS} can be kept.")
        Redactor(wanted.patterns)
        row = upsert(settings).values(**asdict(wanted))
        with self._database.write() as connection:
            connection.execute(
                row.on_conflict_do_update(index_elements=["tenant"], set_=row.excluded)
            )
        if wanted.sample == 0:
            self.forget(requests.c.tenant == wanted.tenant, said_only=True)
        return wanted

    # Writing and reading

    def write(self, entries: Sequence[Entry], said: Mapping[str, Contents]) -> None:
        """Write many in one transaction; durable when this returns. Idempotent.

        `said` is by request id. Of a tenant that does not want it any more nothing is kept: who
        turns it off is never overtaken by what was waiting to be written.
        """
        with self._database.write() as connection:
            wants = {tenant for tenant, s in _settings(connection).items() if s.sample > 0}
            rows = [asdict(entry) for entry in entries]
            connection.execute(upsert(requests).on_conflict_do_nothing(), rows)
            kept = [
                {"request_id": e.request_id, **asdict(said[e.request_id])}
                for e in entries
                if e.tenant in wants and e.request_id in said
            ]
            if kept:
                connection.execute(upsert(contents).on_conflict_do_nothing(), kept)

    def find(self, wanted: Wanted, *, limit: int = PAGE, before: int | None = None) -> list[Logged]:
        """Return the latest requests, the latest first; `before` is a `seq`, for the next page."""
        query = _query(wanted).order_by(requests.c.seq.desc()).limit(limit)
        if before is not None:
            query = query.where(requests.c.seq < before)
        with self._database.read() as connection:
            return [_logged(row) for row in connection.execute(query)]

    def get(self, request_id: str, tenant: str | None) -> Logged:
        """Return one request. `tenant` None is the operator. Raises RequestNotLogged."""
        found = self.find(Wanted(tenant=tenant, request_id=request_id))
        if not found:
            raise RequestNotLogged(f"The log has no request {request_id[:64]!r}.")
        return found[0]

    def walk(self, wanted: Wanted) -> Iterator[Logged]:
        """Yield all of them, the oldest first, a page in memory at a time."""
        last = 0
        while True:
            query = _query(wanted).where(requests.c.seq > last).order_by(requests.c.seq)
            with self._database.read() as connection:
                page = [_logged(row) for row in connection.execute(query.limit(PAGE))]
            if not page:
                return
            yield from page
            last = page[-1].seq

    def count(self, wanted: Wanted) -> int:
        query = select(func.count()).select_from(_joined()).where(*wanted.conditions())
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    # Deleting

    def prune(self, *, most: int | None = None) -> int:
        """Delete what is older than its tenant wants; return how many requests that were.

        `most` bounds the work: the rest is for the next call.
        """
        deleted = 0
        for condition in self._outlived():
            left = None if most is None else most - deleted
            deleted += self.forget(condition, most=left)
        return deleted

    def _outlived(self) -> list[ColumnElement[bool]]:
        known = self.settings()
        at, tenant, seq = requests.c.at, requests.c.tenant, requests.c.seq
        found = [
            (tenant == name) & (at < _days_ago(wanted.keep_days)) for name, wanted in known.items()
        ]
        found.append(tenant.not_in(list(known)) & (at < _days_ago(DEFAULT_DAYS)))
        newest = select(func.max(seq)).scalar_subquery()
        return [*found, seq <= newest - MAX_ROWS]

    def forget(
        self, condition: ColumnElement[bool], *, said_only: bool = False, most: int | None = None
    ) -> int:
        """Delete requests, or only what was said in them, and wipe where it stood."""
        deleted = 0
        query = select(requests.c.request_id).where(condition)
        if said_only:
            query = query.where(requests.c.request_id.in_(select(contents.c.request_id)))
        while most is None or deleted < most:
            with self._database.write() as connection:
                # Without it SQLite only forgets where the bytes are.
                connection.execute(text("PRAGMA secure_delete=ON"))
                ids = list(connection.execute(query.limit(BATCH)).scalars())
                connection.execute(delete(contents).where(contents.c.request_id.in_(ids)))
                if not said_only:
                    connection.execute(delete(requests).where(requests.c.request_id.in_(ids)))
            deleted += len(ids)
            if len(ids) < BATCH:
                break
        if deleted:
            self._database.wipe_log()  # else the bytes stay in the write-ahead log
        return deleted


def older_than(span: timedelta, tenant: str | None) -> ColumnElement[bool]:
    """Return the condition of what is older than a span, for `Logs.forget`."""
    condition = requests.c.at < ago(span)
    return condition if tenant is None else condition & (requests.c.tenant == tenant)


def _days_ago(days: int) -> str:
    return ago(timedelta(days=days))


def ago(span: timedelta) -> str:
    """Return the time so long ago as an entry's `at` has it: ISO 8601, UTC."""
    return (datetime.now(UTC) - span).isoformat(timespec="milliseconds")


def _joined() -> Any:
    return requests.outerjoin(contents, contents.c.request_id == requests.c.request_id)


def _query(wanted: Wanted) -> Any:
    columns = [*requests.c, contents.c.prompt, contents.c.answers]
    return select(*columns).select_from(_joined()).where(*wanted.conditions())


def _logged(row: Row[Any]) -> Logged:
    facts = dict(row._mapping)  # SQLAlchemy's documented name
    seq, prompt, answers = facts.pop("seq"), facts.pop("prompt"), facts.pop("answers")
    said = None if prompt is None else Contents(tuple(prompt), tuple(answers))
    return Logged(seq, Entry(**facts), said)


def _settings(connection: Connection) -> dict[str, LogSettings]:
    rows = connection.execute(select(settings).order_by(settings.c.tenant))
    return {row.tenant: LogSettings(**row._mapping) for row in rows}
