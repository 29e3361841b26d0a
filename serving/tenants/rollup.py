"""Writes what was used and what is held, in the caller's transaction."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from serving.tenants.limit import EVERYBODY, WHOLE, Subject
from serving.tenants.standing import Standing
from serving.tenants.tables import buckets, holdings, limit_events, limits, servers, spent, usage
from serving.tenants.tally import Amount, Batch, Holding, UsageKey


class RollUp:
    """The rows of one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, batch: Batch) -> None:
        """Add what was used to the roll-ups and their sums; give back what was not."""
        if batch.usage:
            rows = [{**asdict(key), **asdict(amount)} for key, amount in batch.usage.items()]
            self._connection.execute(_ADD_USAGE, rows)
            self._connection.execute(_ADD_SPENT, _spent_rows(batch.usage))
        for subject, tokens in batch.unused.items():
            same = (buckets.c.tenant == subject.tenant) & (buckets.c.name == subject.name)
            # Less than nothing may be taken then: whoever reads a bucket reads a full one.
            self._connection.execute(
                update(buckets).where(same).values(tokens=buckets.c.tokens - tokens)
            )

    def put_buckets(self, standings: Iterable[Standing]) -> None:
        """Write what was taken out of buckets that a server kept in memory."""
        rows = [
            {
                "tenant": s.subject.tenant,
                "name": s.subject.name,
                "requests": s.requests.taken if s.requests else 0.0,
                "tokens": s.tokens.taken if s.tokens else 0.0,
                "at": bucket.at,
            }
            for s in standings
            if (bucket := s.requests or s.tokens) is not None
        ]
        if rows:
            self._connection.execute(_PUT_BUCKET, rows)

    def sign(self, server: str, *, alone: bool) -> None:
        """Write that a server runs."""
        put = upsert(servers).values(server=server, alone=alone)
        self._connection.execute(put.on_conflict_do_update(set_={"alone": put.excluded.alone}))

    def others(self, server: str) -> dict[str, bool]:
        """Return of every other server whether it thinks it is alone."""
        query = select(servers.c.server, servers.c.alone).where(servers.c.server != server)
        return {row.server: row.alone for row in self._connection.execute(query)}

    def changes(self) -> int:
        """Return how often limits were changed."""
        return self._connection.execute(select(func.max(limit_events.c.seq))).scalar() or 0

    def forget(self, server: str) -> None:
        """Remove a server that has ended, and what it held."""
        for table in (servers, holdings):
            self._connection.execute(delete(table).where(table.c.server == server))

    def hold(self, server: str, held: Mapping[Subject, Holding], batch: Batch) -> None:
        """Replace what a server's answers hold, where a limit asks, after `batch` was added."""
        self._connection.execute(delete(holdings).where(holdings.c.server == server))
        asked = set(map(tuple, self._connection.execute(_HELD_AGAINST)))
        rows = [
            {
                "tenant": s.tenant,
                "name": s.name,
                "server": server,
                "answers": h.answers,
                "tokens": h.tokens - batch.used.get(s, 0),
            }
            for s, h in held.items()
            if (s.tenant, s.name) in asked or (EVERYBODY, s.name) in asked
        ]
        if rows:
            self._connection.execute(insert(holdings), rows)


_HELD_AGAINST = select(limits.c.tenant, limits.c.name).where(
    limits.c.concurrent.is_not(None)
    | limits.c.tokens_per_day.is_not(None)
    | limits.c.tokens_per_month.is_not(None)
)
_put_bucket = upsert(buckets)
_PUT_BUCKET = _put_bucket.on_conflict_do_update(
    set_={
        "requests": _put_bucket.excluded.requests,
        "tokens": _put_bucket.excluded.tokens,
        "at": _put_bucket.excluded.at,
    }
)
_put_usage = upsert(usage)
_ADD_USAGE = _put_usage.on_conflict_do_update(
    set_={
        "version": _put_usage.excluded.version,
        "answers": usage.c.answers + _put_usage.excluded.answers,
        "prompt_tokens": usage.c.prompt_tokens + _put_usage.excluded.prompt_tokens,
        "completion_tokens": usage.c.completion_tokens + _put_usage.excluded.completion_tokens,
    }
)
_put_spent = upsert(spent)
_ADD_SPENT = _put_spent.on_conflict_do_update(
    set_={"tokens": spent.c.tokens + _put_spent.excluded.tokens}
)


def _spent_rows(used: Mapping[UsageKey, Amount]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str, str], int] = {}
    for key, amount in used.items():
        for name in (WHOLE, key.name):
            for period in (key.hour[:10], key.hour[:7]):
                row = (key.tenant, name, period)
                sums[row] = sums.get(row, 0) + amount.tokens
    return [
        {"tenant": tenant, "name": name, "period": period, "tokens": tokens}
        for (tenant, name, period), tokens in sums.items()
    ]
