"""The buckets of all tenants, shared by every server of one home.

Each question is one small SQLite transaction on the event loop, some 60 µs: it reads the limits
and the buckets as they are now, and writes what was taken. Nothing waits for a disk: the file is
synced by whoever writes usage. While the database cannot be used, this server goes on with what
it knew last; limits are its own then, and `problem` says why.

Times are of the monotonic clock, which is one for all processes of a machine. After a reboot it
begins again; a bucket that comes from its future then simply stays as it is.
"""

import logging
import sqlite3
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from registry.errors import StoreUnavailable, WardrobeError
from serving.tenants.bucket import Bucket
from serving.tenants.limit import (
    BUILT_IN,
    WHOLE,
    Limit,
    LimitReached,
    NeverFits,
    Subject,
)
from serving.tenants.standing import Clock, Standing
from serving.tenants.tally import Tally

BUSY_SECONDS = 0.05  # how long the event loop may wait for another process
AGAIN_SECONDS = 1.0  # after a failure
DEAD_SECONDS = 10.0  # holdings that nobody has confirmed for so long are of a server that is gone

log = logging.getLogger("wardrobe.limits")

Step = Callable[[Standing], Standing]
Found = tuple[list[Standing], WardrobeError | None]  # afterwards; what was refused, and why
Row = tuple[Any, ...]

# In one statement: each one gives the interpreter away, and has to wait to get it back.
_LIMIT_AND_BUCKET = """
SELECT own.requests_per_minute, own.tokens_per_minute, own.concurrent,
       own.tokens_per_day, own.tokens_per_month,
       everybody.requests_per_minute, everybody.tokens_per_minute, everybody.concurrent,
       everybody.tokens_per_day, everybody.tokens_per_month,
       bucket.requests, bucket.tokens, bucket.at
FROM (SELECT 1)
LEFT JOIN limits AS own ON own.tenant = ?1 AND own.name = ?2
LEFT JOIN limits AS everybody ON everybody.tenant = '*' AND everybody.name = ?2
LEFT JOIN buckets AS bucket ON bucket.tenant = ?1 AND bucket.name = ?2
"""
_OTHERS = """
SELECT COALESCE(SUM(answers), 0), COALESCE(SUM(tokens), 0) FROM holdings
WHERE tenant = ? AND name = ? AND server <> ? AND seen_at BETWEEN ? AND ?
"""
_SPENT = "SELECT period, tokens FROM spent WHERE tenant = ? AND name = ? AND period IN (?, ?)"
_PUT_BUCKET = """
INSERT INTO buckets (tenant, name, requests, tokens, at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens, at = excluded.at
"""
_PUT_HOLDING = """
INSERT INTO holdings (tenant, name, server, answers, tokens, seen_at) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET
answers = excluded.answers, tokens = excluded.tokens, seen_at = excluded.seen_at
"""


class Balances:
    """Used by one event loop."""

    def __init__(self, path: Path, server: str, tally: Tally, clock: Clock) -> None:
        """Open a database that `Ledger` has prepared."""
        self._server = server
        self._tally = tally
        self._clock = clock
        self._known: dict[Subject, Standing] = {}  # for when the database cannot be used
        self._again_at = 0.0
        self.problem = ""  # why limits are not shared now
        self._connection = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("PRAGMA wal_autocheckpoint=0")

    def close(self) -> None:
        self._connection.close()

    def step(self, tenant: str, name: str, step: Step) -> Found:
        """Apply one step to the standings of a tenant and of a name it calls: to both or to none.

        Returns the standings, and what `step` raised where it refused.
        """
        now = self._clock.seconds()
        subjects = (Subject(tenant), Subject(tenant, name))
        if now >= self._again_at:
            try:
                return self._shared(subjects, step)
            except sqlite3.Error as error:
                log.error("limits are those of this process for now: %s", error)
                self.problem, self._again_at = str(error), now + AGAIN_SECONDS
        return self._alone(subjects, step, now)

    def look(self, subject: Subject) -> Standing:
        """Return where a subject stands, with all sums. Raises StoreUnavailable."""
        try:
            self._connection.execute("BEGIN")
            try:
                return self._read(subject, 0, self._clock.seconds(), whole=True)
            finally:
                self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise StoreUnavailable(f"The limits cannot be read now: {error}.") from error

    def _shared(self, subjects: tuple[Subject, ...], step: Step) -> Found:
        self._connection.execute("BEGIN IMMEDIATE")
        now = self._clock.seconds()  # only now: nobody has written anything later than this
        returned = {subject: self._tally.take_unused(subject) for subject in subjects}
        try:
            before = [self._read(subject, returned[subject], now) for subject in subjects]
            after, refused = _apply(step, before)
            self._hold(before, after)
            try:
                for standing in after:
                    self._write(standing, now)
                self._connection.execute("COMMIT")
            except BaseException:
                self._hold(after, before)
                raise
        except BaseException:
            for subject, tokens in returned.items():
                self._tally.put_unused(subject, tokens)
            if self._connection.in_transaction:  # a full disk may have ended it already
                self._connection.execute("ROLLBACK")
            raise
        self.problem = ""
        self._known.update({standing.subject: standing for standing in after})
        return after, refused

    def _alone(self, subjects: tuple[Subject, ...], step: Step, now: float) -> Found:
        before = [self._remember(subject, now) for subject in subjects]
        after, refused = _apply(step, before)
        self._hold(before, after)
        self._known.update({standing.subject: standing for standing in after})
        return after, refused

    def _hold(self, before: list[Standing], after: list[Standing]) -> None:
        for old, new in zip(before, after, strict=True):
            self._tally.hold(new.subject, new.answers - old.answers, new.held - old.held)

    def _read(
        self, subject: Subject, returned: int, now: float, *, whole: bool = False
    ) -> Standing:
        """Return a standing; what no limit asks for is only read for the `whole` of it."""
        execute = self._connection.execute
        key = (subject.tenant, subject.name)
        row = execute(_LIMIT_AND_BUCKET, key).fetchone()
        limit, (requests, tokens, at) = _limit_of(subject.name == WHOLE, row[:10]), row[10:]
        answers = held = day = month = 0
        period = self._clock.period()
        if whole or limit.concurrent is not None or limit.has_budget:
            alive = (now - DEAD_SECONDS, now)
            answers, held = execute(_OTHERS, (*key, self._server, *alive)).fetchone()
        if whole or limit.has_budget:
            sums = dict(execute(_SPENT, (*key, period.day, period.month)).fetchall())
            day, month = sums.get(period.day, 0), sums.get(period.month, 0)
        mine = self._tally.holding(subject)
        return Standing(
            subject,
            limit,
            period,
            _bucket(limit.requests_per_minute, requests, at, 0, now),
            _bucket(limit.tokens_per_minute, tokens, at, returned, now),
            answers + mine.answers,
            held + mine.tokens,
            day,
            month,
        )

    def _write(self, standing: Standing, now: float) -> None:
        key = (standing.subject.tenant, standing.subject.name)
        limit = standing.limit
        if standing.requests is not None or standing.tokens is not None:
            taken = (_taken(standing.requests), _taken(standing.tokens))
            self._connection.execute(_PUT_BUCKET, (*key, *taken, now))
        if limit.concurrent is not None or limit.has_budget:
            mine = self._tally.holding(standing.subject)
            row = (*key, self._server, mine.answers, mine.tokens, now)
            self._connection.execute(_PUT_HOLDING, row)

    def _remember(self, subject: Subject, now: float) -> Standing:
        """Return what was known last, moved to now. What was never seen has the built-in limit."""
        limit = BUILT_IN if subject.name == WHOLE else Limit()
        known = self._known.get(subject) or Standing(subject, limit, self._clock.period())
        limit, mine = known.limit, self._tally.holding(subject)
        returned = self._tally.take_unused(subject)
        requests, tokens = known.requests, known.tokens
        at = requests.at if requests else tokens.at if tokens else now
        return Standing(
            subject,
            limit,
            self._clock.period(),
            _bucket(limit.requests_per_minute, _taken(requests), at, 0, now),
            _bucket(limit.tokens_per_minute, _taken(tokens), at, returned, now),
            mine.answers,
            mine.tokens,
            known.day,
            known.month,
        )


def _apply(step: Step, before: list[Standing]) -> Found:
    try:
        return [step(standing) for standing in before], None
    except (LimitReached, NeverFits) as refused:
        return before, refused


def _taken(bucket: Bucket | None) -> float:
    return bucket.taken if bucket else 0.0


def _bucket(
    size: int | None, taken: float | None, at: float | None, returned: int, now: float
) -> Bucket | None:
    """Return the bucket as it is now, with what comes back; full where none was kept yet."""
    if size is None:
        return None
    if taken is None or at is None:
        return Bucket.full(size, now)
    return Bucket(size, taken, at).moved_to(now).give_back(returned)


@lru_cache(maxsize=4096)
def _limit_of(whole: bool, columns: Row) -> Limit:
    """Return the limit in force, from a tenant's own and everybody's."""
    own, everybody = Limit(*columns[:5]), Limit(*columns[5:])
    return own.over(everybody.over(BUILT_IN)) if whole else own
