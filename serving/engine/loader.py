"""Adapters on their way from disk to host memory, off the step thread."""

import time
from collections import OrderedDict
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

from registry.adapter import AdapterRef
from registry.materialize import StoredFiles
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed, LoadStage
from serving.engine.hardware import compute_alone
from serving.engine.lora import HostAdapter

# A folder with the right files, or the bytes of such, which tell by a check that they are right.
Fetch = Callable[[AdapterRef], Path | StoredFiles]
Read = Callable[[Path | AdapterFiles, AdapterRef], HostAdapter]
Load = Future[HostAdapter]

FAILURE_SECONDS = 1.0  # a failed load is not tried again for this long
WORKERS = 2  # a slow fetch does not hold up every other load


class AdapterLoader:
    """Loads each digest once at a time, and keeps the latest ones within `budget` bytes."""

    def __init__(self, fetch: Fetch, read: Read, budget: int) -> None:
        self._fetch, self._read, self._budget = fetch, read, budget
        self.on_done: Callable[[], None] = lambda: None  # called on a worker after each load
        self._pool = ThreadPoolExecutor(WORKERS, "adapter-load", initializer=compute_alone)
        self._checks = ThreadPoolExecutor(WORKERS, "adapter-check")
        self._lock = Lock()
        # An ended load stays while somebody holds it: who asks before it is in a slot shares it.
        self._loads = WeakValueDictionary[str, Load]()
        self._ahead: Load | None = None  # the latest one from files, until somebody asks for it
        self._failed: OrderedDict[str, tuple[float, Load]] = OrderedDict()
        self._cache: OrderedDict[str, tuple[int, Load]] = OrderedDict()  # digest → bytes, load
        self._bytes = 0
        self._fetches = self._reads = 0
        self._fetch_seconds = self._read_seconds = 0.0

    def load(self, ref: AdapterRef, files: AdapterFiles | None = None) -> Load:
        """Return the running, the recent failed or the cached load, or start one.

        It reads from `files` when they are given, and fetches nothing.

        The future fails with AdapterLoadFailed. Never blocks on the load itself.
        """
        with self._lock:
            self._forget_failures()
            if ref.digest in self._cache:
                self._cache.move_to_end(ref.digest)
                return self._cache[ref.digest][1]
            if ref.digest in self._failed:
                return self._failed[ref.digest][1]
            future = self._loads.get(ref.digest)
            if future is None:
                future = self._loads[ref.digest] = Future()
                self._pool.submit(self._run, ref, future, files)
            if files is not None:
                self._ahead = future
            elif future is self._ahead:
                self._ahead = None
            return future

    @property
    def running(self) -> int:
        """How many loads have not ended, whether somebody waits for them or not."""
        with self._lock:
            return sum(not load.done() for load in self._loads.values())

    def cached_beside(self, digests: Container[str]) -> int:
        """Return how many adapters are in host memory beside these."""
        with self._lock:
            return sum(digest not in digests for digest in self._cache)

    def stages(self) -> tuple[LoadStage, ...]:
        """Return what fetches and reads took, failed ones too."""
        with self._lock:
            return (
                LoadStage("fetch", self._fetches, self._fetch_seconds),
                LoadStage("read", self._reads, self._read_seconds),
            )

    def close(self) -> None:
        """Start no more loads. One that hangs in `fetch` must not hang whoever closes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._checks.shutdown(wait=False)

    def _run(self, ref: AdapterRef, future: Load, files: AdapterFiles | None) -> None:
        try:
            adapter = self._made(files or self._timed_fetch(ref), ref)
        except AdapterLoadFailed as error:
            self._settle(ref, future, error)
        except BaseException as error:  # a panic in a library's Rust is no Exception; unsettled, it
            # would leave everybody who waits for this adapter waiting for ever
            failure = AdapterLoadFailed(f"{ref.label} cannot be fetched: {error}")
            failure.__cause__ = error
            self._settle(ref, future, failure)
        else:
            self._settle(ref, future, adapter)
        self.on_done()

    def _made(self, source: Path | AdapterFiles | StoredFiles, ref: AdapterRef) -> HostAdapter:
        """Read and convert; where the bytes are to be checked, while that is done."""
        if not isinstance(source, StoredFiles):
            return self._timed_read(source, ref)
        checked = self._checks.submit(source.check)
        try:
            return self._timed_read(AdapterFiles(source.config, [source.weights]), ref)
        finally:
            checked.result()  # raises for the wrong bytes, whatever was made of them

    def _timed_fetch(self, ref: AdapterRef) -> Path | StoredFiles:
        started = time.monotonic()
        try:
            return self._fetch(ref)
        finally:
            with self._lock:
                self._fetches += 1
                self._fetch_seconds += time.monotonic() - started

    def _timed_read(self, source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        started = time.monotonic()
        try:
            return self._read(source, ref)
        finally:
            with self._lock:
                self._reads += 1
                self._read_seconds += time.monotonic() - started

    def _settle(
        self, ref: AdapterRef, future: Load, result: HostAdapter | AdapterLoadFailed
    ) -> None:
        with self._lock:
            if isinstance(result, AdapterLoadFailed):
                del self._loads[ref.digest]
                self._failed[ref.digest] = (time.monotonic(), future)
                future.set_exception(result)
            else:
                future.set_result(result)
                self._keep(ref.digest, result.size_bytes, future)

    def _keep(self, digest: str, size: int, future: Load) -> None:
        self._cache[digest] = (size, future)
        self._bytes += size
        while self._bytes > self._budget:
            _, (evicted, _) = self._cache.popitem(last=False)
            self._bytes -= evicted

    def _forget_failures(self) -> None:
        oldest = time.monotonic() - FAILURE_SECONDS
        while self._failed and next(iter(self._failed.values()))[0] < oldest:
            self._failed.popitem(last=False)
