"""Writes exposures before the first token leaves, many requests in one durable transaction.

One thread writes whatever has come in since its last write, so that a busy server pays for few
transactions and a quiet one waits for a single one. Nobody waits long for a database that somebody
else holds: the request goes on without being exposed, and its row is then never written.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from registry.errors import StoreUnavailable, WardrobeError
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.store import Experiments

MAX_QUEUED = 10_000
BATCH = 500
EXPOSE_SECONDS = 0.25  # that a request waits until its row is being written
AGAIN_SECONDS = 1.0  # between attempts to write outcomes

log = logging.getLogger("wardrobe.experiments")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row to write; `done` is told what became of it, from the writing thread."""

    row: Exposure | Outcome
    done: Callable[[WardrobeError | None], None] | None = None
    # Whoever takes it decides: the thread that writes the row, or the request that goes without.
    turn: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        return self.turn.acquire(blocking=False)


@dataclass(slots=True)
class Recorder:
    """The writing thread, from `start` to `stop`."""

    store: Experiments
    _queue: "queue.Queue[_Entry | None]" = field(default_factory=lambda: queue.Queue(MAX_QUEUED))
    _thread: threading.Thread | None = None
    _unwritten: list[_Entry] = field(default_factory=list[_Entry])  # outcomes that met a failure

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="experiments", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, then end."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    async def expose(self, row: Exposure) -> None:
        """Return when the row is durable.

        Raises StoreUnavailable when it was not; within EXPOSE_SECONDS when the database is held by
        somebody else. Raises IntegrityError when the database refuses it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle(error: WardrobeError | None) -> None:
            if future.done():
                return  # nobody waits for it any more
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        def done(error: WardrobeError | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, error)

        entry = _Entry(row, done)
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            raise StoreUnavailable("Too many exposures wait to be written.") from None
        try:
            await asyncio.wait([future], timeout=EXPOSE_SECONDS)
            if not future.done() and entry.take():
                raise StoreUnavailable(
                    f"The database was not free within {EXPOSE_SECONDS:g} seconds."
                )
            await future
        finally:
            future.cancel()  # else what the thread tells it later would be an unheard exception

    def end(self, row: Outcome) -> None:
        """Take the outcome of an exposed answer; it is written soon. Never blocks."""
        try:
            self._queue.put_nowait(_Entry(row))
        except queue.Full:
            log.error("the outcome of %s found the queue full and is lost", row.request_id)

    def _run(self) -> None:
        going = True
        while going:
            batch = self._take()
            going = None not in batch
            entries = self._unwritten + [entry for entry in batch if entry is not None]
            error = self._write(entries)
            free_again = isinstance(error, StoreUnavailable)  # what is refused stays refused
            self._unwritten = self._left(entries) if free_again else []
            for entry in entries:
                if entry.done is not None:
                    entry.done(error)

    def _take(self) -> list[_Entry | None]:
        """Wait for one entry, then take what else is there."""
        try:
            batch = [self._queue.get(timeout=AGAIN_SECONDS if self._unwritten else None)]
        except queue.Empty:
            return []  # for another attempt
        while len(batch) < BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _left(self, entries: list[_Entry]) -> list[_Entry]:
        """Return the outcomes to try again; exposures have no second chance."""
        ended = [entry for entry in entries if isinstance(entry.row, Outcome)]
        if len(ended) > MAX_QUEUED:
            log.error("the outcomes of %d answers are lost", len(ended) - MAX_QUEUED)
        return ended[:MAX_QUEUED]

    def _write(self, entries: list[_Entry]) -> WardrobeError | None:
        ended = [entry.row for entry in entries if isinstance(entry.row, Outcome)]
        try:
            with self.store.recording() as write:
                waited = [entry for entry in entries if entry.done is not None and entry.take()]
                exposed = [entry.row for entry in waited if isinstance(entry.row, Exposure)]
                write(exposed, ended)
        except WardrobeError as error:
            log.error("exposures could not be written: %s", error.message)
            return error
        except Exception as error:  # the thread goes on: without it every request would wait
            log.exception("exposures could not be written")
            return StoreUnavailable(f"Exposures could not be written: {error}")
        return None
