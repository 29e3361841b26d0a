"""The buckets of all tenants, shared by every server of one home.

Each step is one small SQLite transaction on the event loop: it reads the limits and the buckets
as they are now, and writes what was taken. Nothing waits for a disk: the file is synced by whoever
writes usage. Its statements give the interpreter away some ten times, though, and a busy engine is
slow to give it back. So a server that is alone on its home owns what it has read, takes steps on
that in memory, and gives it with each write of usage.

While the database cannot be used, this server goes on with what it knew last; limits are its own
then, and `problem` says why.

Times are of the monotonic clock, which is one for all processes of a machine. After a reboot it
begins again; a bucket that comes from its future then simply stays as it is.
"""

import logging
import sqlite3
import threading
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
from serving.tenants.tally import Batch, Tally

BUSY_SECONDS = 0.05  # how long the event loop may wait for another process
AGAIN_SECONDS = 1.0  # after a failure
OWNED_SECONDS = 60.0  # after its last use

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
WHERE tenant = ? AND name = ? AND server <> ?
"""
_SPENT = "SELECT period, tokens FROM spent WHERE tenant = ? AND name = ? AND period IN (?, ?)"
_PUT_BUCKET = """
INSERT INTO buckets (tenant, name, requests, tokens, at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens, at = excluded.at
"""
_PUT_HOLDING = """
INSERT INTO holdings (tenant, name, server, answers, tokens) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET answers = excluded.answers, tokens = excluded.tokens
"""


class Balances:
    """Used by one event loop."""

    def __init__(self, path: Path, server: str, tally: Tally, clock: Clock) -> None:
        """Open a database that `Ledger` has prepared."""
        self._server = server
        self._tally = tally
        self._clock = clock
        self._known: dict[Subject, Standing] = {}
        # What the database may know less of than this server, and when it was used last.
        self._owned: dict[Subject, float] = {}
        self._changed: set[Subject] = set()  # since it was written
        self._unread: set[Subject] = set()  # owned since before the write that is going on
        self.alone = False  # no other server lives on this home
        self._turn = threading.Lock()  # a step in memory, or a change of who owns what
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
        with self._turn:
            if self._owned.keys() >= set(subjects):
                return self._in_memory(subjects, step, now)
        if now >= self._again_at:
            try:
                return self._shared(subjects, step)
            except sqlite3.Error as error:
                if not self.problem:
                    log.error("limits are those of this process for now: %s", error)
                self.problem, self._again_at = str(error), now + AGAIN_SECONDS
        with self._turn:  # and nothing more is owned: what was not read may be an old limit
            return self._in_memory(subjects, step, now)

    def give(self, *, alone: bool, keep: bool) -> tuple[Batch, list[Standing]]:
        """Return what is to be written, to whoever holds the database's write lock.

        What is owned stays so while it is used, unless `keep` is false: then the next step reads
        what was written. It may own that again when the server is `alone`.
        """
        with self._turn:
            now, batch = self._clock.seconds(), self._tally.take()
            changed = self._changed | (self._owned.keys() & batch.unused.keys())
            given = [self._remember(s, batch.unused.pop(s, 0), now) for s in changed]
            self._know(given)
            in_use = {s: at for s, at in self._owned.items() if now - at < OWNED_SECONDS}
            self._owned, self._changed, self.alone = in_use if keep else {}, set(), alone
            self._unread = set(self._owned)
            return batch, given

    def take_back(self, batch: Batch, given: list[Standing], *, alone: bool) -> None:
        """Undo `give`: it could not be written."""
        with self._turn:
            now = self._clock.seconds()
            self._tally.put(batch)
            self._changed.update(standing.subject for standing in given)
            self._owned.update(dict.fromkeys(self._changed, now))
            self.alone = alone

    def was_written(self, batch: Batch) -> None:
        """Count what was used where it now stands, and no longer among what is held."""
        with self._turn:
            self._tally.release(batch)
            for key, amount in batch.usage.items():
                for subject in (Subject(key.tenant), Subject(key.tenant, key.name)):
                    if subject in self._unread:
                        self._know([self._known[subject].with_used(key.hour, amount.tokens)])

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
        # In this order, as whoever gives has it. Until the end: what is owned must not be given
        # between its COMMIT and the moment it is known here.
        with self._turn:
            now = self._clock.seconds()  # only now: nobody has written anything later than this
            returned = [self._tally.take_unused(subject) for subject in subjects]
            try:
                found = self._transact(subjects, returned, step, now)
            except BaseException:
                for subject, tokens in zip(subjects, returned, strict=True):
                    self._tally.put_unused(subject, tokens)
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise
            self.problem = ""
            self._know(found[0])
            if self.alone:
                self._owned.update(dict.fromkeys(subjects, now))
                self._changed.difference_update(subjects)
        return found

    def _transact(
        self, subjects: tuple[Subject, ...], returned: list[int], step: Step, now: float
    ) -> Found:
        before = [
            self._remember(subject, tokens, now)
            if subject in self._owned
            else self._read(subject, tokens, now)
            for subject, tokens in zip(subjects, returned, strict=True)
        ]
        after, refused = _apply(step, before)
        self._hold(before, after)
        try:
            for standing in after:
                self._write(standing, now)
            self._connection.execute("COMMIT")
        except BaseException:
            self._hold(after, before)
            raise
        return after, refused

    def _in_memory(self, subjects: tuple[Subject, ...], step: Step, now: float) -> Found:
        before = [self._remember(s, self._tally.take_unused(s), now) for s in subjects]
        after, refused = _apply(step, before)
        self._hold(before, after)
        self._know(after)
        for subject in self._owned.keys() & set(subjects):
            self._owned[subject] = now
            self._changed.add(subject)
        return after, refused

    def _know(self, standings: list[Standing]) -> None:
        self._known.update({standing.subject: standing for standing in standings})

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
            answers, held = execute(_OTHERS, (*key, self._server)).fetchone()
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
            row = (*key, self._server, mine.answers, mine.tokens)
            self._connection.execute(_PUT_HOLDING, row)

    def _remember(self, subject: Subject, returned: int, now: float) -> Standing:
        """Return what was known last, moved to now. What was never seen has the built-in limit."""
        limit = BUILT_IN if subject.name == WHOLE else Limit()
        period = self._clock.period()
        known = self._known.get(subject) or Standing(subject, limit, period)
        limit, mine = known.limit, self._tally.holding(subject)
        requests, tokens = known.requests, known.tokens
        at = requests.at if requests else tokens.at if tokens else now
        return Standing(
            subject,
            limit,
            period,
            _bucket(limit.requests_per_minute, _taken(requests), at, 0, now),
            _bucket(limit.tokens_per_minute, _taken(tokens), at, returned, now),
            mine.answers,
            mine.tokens,
            known.day if known.period.day == period.day else 0,
            known.month if known.period.month == period.month else 0,
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
