"""Writes the request log from a thread of its own: whatever the disk does, no request waits.

What finds the queue full is dropped and counted. A database that cannot be written is tried again
until it can; meanwhile the queue fills up.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from registry.errors import StoreUnavailable
from serving.logs.entry import Contents, Entry, LogSettings
from serving.logs.redact import RedactionTooSlow, Redactor
from serving.logs.store import Logs

MAX_QUEUED = 10_000  # requests
MAX_QUEUED_CHARACTERS = 64 * 1024 * 1024  # of prompts and answers that wait
MAX_CHARACTERS = 1_000_000  # of one request's prompt and answers
BATCH = 500
GATHER_SECONDS = 0.2  # what comes in it shares a transaction
RETRY_SECONDS = 1.0
LOOK_SECONDS = 1.0  # how often settings are read when nothing comes
PRUNE_SECONDS = 600.0
PRUNE_ROWS = 5000  # at a time, so that writing goes on

Dropped = Callable[[str, int], None]  # ("request" or "contents", how many)
Item = tuple[Entry, Contents | None]

log = logging.getLogger("wardrobe.logs")


class LogWriter:
    """The writing thread, from `start` to `stop`. `take` and `keeps` may be called before."""

    def __init__(self, store: Logs, dropped: Dropped) -> None:
        self._store = store
        self._dropped = dropped
        self._changed = threading.Condition()
        self._queue: list[Item] = []  # with `_characters` and `_ending`, guarded by `_changed`
        self._characters = 0
        self._ending = False
        self._settings: dict[str, LogSettings] = {}  # replaced as a whole
        self._redactors: dict[str, Redactor] = {}
        self._read_at = self._pruned_at = -PRUNE_SECONDS
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, once, then end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def keeps(self, tenant: str, request_id: str) -> bool:
        """Whether this tenant wants prompt and answer of this request kept."""
        wanted = self._settings.get(tenant)
        return wanted is not None and wanted.keeps(request_id)

    def take(self, entry: Entry, contents: Contents | None) -> None:
        """Take a request that has ended. Never blocks and never raises."""
        with self._changed:
            if self._ending or len(self._queue) >= MAX_QUEUED:
                self._dropped("request", 1)
                return
            size = contents.characters if contents else 0
            if size > min(MAX_CHARACTERS, MAX_QUEUED_CHARACTERS - self._characters):
                self._dropped("contents", 1)
                contents, size = None, 0
            self._characters += size
            self._queue.append((entry, contents))
            if len(self._queue) == 1:  # else the thread is awake, or gathers: a wake costs 0.7 ms
                self._changed.notify()

    def _run(self) -> None:
        while True:
            batch, ending = self._gather()
            if ending and not batch:
                return
            self._survive(self._look)
            if batch and (self._write(batch) or self._lost(batch, ending)):
                with self._changed:
                    del self._queue[: len(batch)]
                    self._characters -= sum(full.characters for _, full in batch if full)

    def _gather(self) -> tuple[list[Item], bool]:
        """Wait for something to write, and a moment longer for what may share its transaction."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ending, LOOK_SECONDS)
            if self._queue:
                self._changed.wait_for(lambda: self._ending, GATHER_SECONDS)
            return self._queue[:BATCH], self._ending

    def _write(self, batch: Sequence[Item]) -> bool:
        """Write a batch; False when the database cannot be written now."""
        try:
            said = {e.request_id: c for e, full in batch if (c := self._redacted(e, full))}
            self._store.write([entry for entry, _ in batch], said)
        except StoreUnavailable as error:
            log.error("the request log cannot be written: %s", error.message)
            return False
        except Exception:  # the thread goes on: without it nothing would be logged any more
            log.exception("%d requests could not be logged", len(batch))
            self._dropped("request", len(batch))
        return True

    def _lost(self, batch: Sequence[Item], ending: bool) -> bool:
        """Wait before a batch is tried again; at the end it is given up instead."""
        if not ending:
            with self._changed:
                self._changed.wait_for(lambda: self._ending, RETRY_SECONDS)
            return False
        self._dropped("request", len(batch))
        return True

    def _redacted(self, entry: Entry, contents: Contents | None) -> Contents | None:
        redactor = self._redactors.get(entry.tenant)
        if contents is None or redactor is None:
            return None
        try:
            return redactor.contents(contents)
        except RedactionTooSlow as error:
            log.error("prompt and answer of %s are not kept: %s", entry.request_id, error)
            self._dropped("contents", 1)
            return None

    def _look(self) -> None:
        """Read the settings, and delete what has outlived its time."""
        moment = time.monotonic()
        if moment - self._read_at >= LOOK_SECONDS:
            self._read_settings()
            self._read_at = moment
        if moment - self._pruned_at >= PRUNE_SECONDS and self._store.prune(most=PRUNE_ROWS) == 0:
            self._pruned_at = moment

    def _read_settings(self) -> None:
        settings = self._store.settings()
        if settings != self._settings:
            self._redactors = {tenant: Redactor(s.patterns) for tenant, s in settings.items()}
            self._settings = settings

    def _survive(self, step: Callable[[], None]) -> None:
        try:
            step()
        except StoreUnavailable as error:
            log.warning("the request log cannot be read, known settings hold: %s", error.message)
        except Exception:
            log.exception("a step of the request log failed, trying again")
