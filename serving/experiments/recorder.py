"""Writes exposures before the first token leaves, many requests in one durable transaction.

One thread writes whatever has come in since its last write, so that a busy server pays for few
transactions and a quiet one waits for a single one.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from registry.errors import StoreUnavailable, WardrobeError
from serving.experiments.store import Experiments, Exposure, Outcome

MAX_QUEUED = 10_000
BATCH = 500

log = logging.getLogger("wardrobe.experiments")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row to write; `done` is told what became of it, from the writing thread."""

    row: Exposure | Outcome
    done: Callable[[WardrobeError | None], None] | None = None


@dataclass(slots=True)
class Recorder:
    """The writing thread, from `start` to `stop`."""

    store: Experiments
    _queue: "queue.Queue[_Entry | None]" = field(default_factory=lambda: queue.Queue(MAX_QUEUED))
    _thread: threading.Thread | None = None

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
        """Return when the row is durable. Raises StoreUnavailable."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle(error: WardrobeError | None) -> None:
            if future.done():
                return  # the client has gone meanwhile
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

        def done(error: WardrobeError | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, error)

        try:
            self._queue.put_nowait(_Entry(row, done))
        except queue.Full:
            raise StoreUnavailable("Too many exposures wait to be written.") from None
        await future

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
            entries = [entry for entry in batch if entry is not None]
            error = self._write(entries)
            for entry in entries:
                if entry.done is not None:
                    entry.done(error)

    def _take(self) -> list[_Entry | None]:
        """Wait for one entry, then take what else is there."""
        batch = [self._queue.get()]
        while len(batch) < BATCH and batch[-1] is not None:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _write(self, entries: list[_Entry]) -> WardrobeError | None:
        exposed = [entry.row for entry in entries if isinstance(entry.row, Exposure)]
        ended = [entry.row for entry in entries if isinstance(entry.row, Outcome)]
        try:
            self.store.record(exposed, ended)
        except WardrobeError as error:
            log.error("exposures could not be written: %s", error.message)
            return error
        except Exception as error:  # the thread goes on: without it every request would wait
            log.exception("exposures could not be written")
            return StoreUnavailable(f"Exposures could not be written: {error}")
        return None
