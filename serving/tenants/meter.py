"""Counts what every answer used, and holds it to its limits: from admission to its last byte.

Usage is written by a thread, many answers in one transaction, a quarter of a second after they
ended at the latest. A server that is killed loses that much and the answers that ran.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from registry.errors import WardrobeError
from serving.tenants.balances import Balances
from serving.tenants.ledger import Ledger
from serving.tenants.limit import Subject
from serving.tenants.presence import Presence
from serving.tenants.rollup import RollUp
from serving.tenants.standing import Clock, Standing, headers_of
from serving.tenants.tally import Amount, Batch, Tally, UsageKey

PAUSE_SECONDS = 0.25  # between two writes
LOOK_SECONDS = 0.5  # how long an idle server may not notice another one
SYNC_SECONDS = 5.0  # a power cut takes the usage of so long at most

log = logging.getLogger("wardrobe.usage")


class Lease:
    """One request: entered, reserved for, and settled exactly once, however it ends."""

    def __init__(self, meter: "Meter", tenant: str, name: str) -> None:
        self._meter = meter
        self._tenant = tenant
        self._name = name
        self._entered = False
        self._reserved = 0  # tokens
        self._standings: list[Standing] = []

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The `x-ratelimit-*` headers, as of the last step."""
        return headers_of(self._standings)

    def enter(self) -> None:
        """Take one request and one place. Raises LimitReached."""
        self._step(Standing.enter)
        self._entered = True

    def reserve(self, prompt: int, answer: int) -> None:
        """Take the most tokens it may use. Raises LimitReached and NeverFits."""
        self._step(lambda standing: standing.reserve(prompt, answer))
        self._reserved = prompt + answer

    def _step(self, step: Callable[[Standing], Standing]) -> None:
        found = self._meter.balances.step(self._tenant, self._name, step)
        self._standings, refused = found
        self._meter.wake()
        if refused is not None:
            raise refused

    def settle(self, *, digest: str, version: str, prompt: int, completion: int) -> None:
        """Give back what was not used, and count what was."""
        if not self._entered:
            return
        self._entered = False
        amount = Amount(1, prompt, completion)
        key = UsageKey(self._tenant, self._name, digest, version, self._meter.clock.period().hour)
        subjects = (Subject(self._tenant), Subject(self._tenant, self._name))
        used = key if amount.tokens else None
        self._meter.tally.settle(subjects, self._reserved, used, amount)
        self._meter.wake()


@dataclass(slots=True)
class Meter:
    """What one server's requests are measured with, from `start` to `stop`."""

    ledger: Ledger
    server: str
    clock: Clock = field(default_factory=Clock)
    tally: Tally = field(default_factory=Tally)
    balances: Balances = field(init=False)
    presence: Presence = field(init=False)
    _something: threading.Event = field(default_factory=threading.Event)
    _ending: threading.Event = field(default_factory=threading.Event)
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None
    _unsynced: bool = False
    _changes: int = -1  # of limits, as last seen
    _synced_at: float = 0.0

    def __post_init__(self) -> None:
        self.balances = Balances(self.ledger.path, self.server, self.tally, self.clock)
        self.presence = Presence(self.ledger.path.parent, self.server)

    def lease(self, tenant: str, name: str) -> Lease:
        return Lease(self, tenant, name)

    def wake(self) -> None:
        self._something.set()

    def join(self) -> None:
        """Become one of the home's servers. Returns when no other one thinks it is alone."""
        self.presence.begin()
        while self._is_unseen():
            time.sleep(LOOK_SECONDS / 10)

    def _is_unseen(self) -> bool:
        with self.ledger.writing() as writer:
            writer.sign(self.server, alone=False)
            return any(self._others(writer).values())

    def _others(self, writer: RollUp) -> dict[str, bool]:
        """Return of every other server that lives whether it thinks it is alone."""
        others = writer.others(self.server)
        for server in filter(self.presence.is_dead, others.copy()):
            writer.forget(server)
            del others[server]
        return others

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, then end."""
        self._ending.set()
        self._something.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.presence.end()
        self.balances.close()
        self.ledger.close()

    def flush(self) -> None:
        """Write everything that has ended, and the buckets; see who else lives.

        Raises StoreUnavailable, and keeps everything then.
        """
        with self._writing:
            batch, given, was_alone = Batch(), list[Standing](), self.balances.alone
            try:
                with self.ledger.writing() as writer:
                    alone = not self._others(writer) and not self._ending.is_set()
                    writer.sign(self.server, alone=alone)
                    changes = writer.changes()
                    keep = alone and changes == self._changes
                    batch, given = self.balances.give(alone=alone, keep=keep)
                    writer.put_buckets(given)
                    writer.add(batch)
                    writer.hold(self.server, self.tally.holdings(), batch)
            except BaseException:
                self.balances.take_back(batch, given, alone=was_alone)
                raise
            self.balances.was_written(batch)
            self._changes = changes
            self._unsynced |= bool(batch)

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._something.wait(LOOK_SECONDS) or self._is_late():
                self._something.clear()
                self._try_flush()
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self._sync()
            self._ending.wait(PAUSE_SECONDS)
        self._try_flush()
        self._sync()
        if lost := sum(amount.answers for amount in self.tally.take().usage.values()):
            log.error("the usage of %d answers is lost", lost)

    def _is_late(self) -> bool:
        """Tell whether another server came to where this one was alone, or limits were changed."""
        try:
            joined, changes = self.ledger.news(self.server)
        except WardrobeError:
            return True  # the flush will say what is wrong
        return self.balances.alone and (joined or changes != self._changes)

    def _try_flush(self) -> None:
        try:
            self.flush()
        except Exception as error:  # the thread goes on: it is the only one that writes
            reason = error.message if isinstance(error, WardrobeError) else repr(error)
            log.error("usage could not be written now: %s", reason)
            self.wake()

    def _sync(self) -> None:
        if not self._unsynced:
            return
        self._synced_at = time.monotonic()
        try:
            self.ledger.checkpoint()
            self._unsynced = False
        except WardrobeError as error:
            log.error("usage could not be synced: %s", error.message)
