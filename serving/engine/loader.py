"""Adapters on their way from disk to host memory, off the step thread.

How much memory a load takes is known before it takes any, from the size and the header of its file,
and it waits until that fits beside what is on its way. Alone every load may run. A load takes its
memory until nobody holds it: also while it waits for a slot, or is copied into one.
"""

import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from pathlib import Path
from threading import Lock
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary

from registry.adapter import AdapterRef
from registry.errors import IntegrityError
from registry.materialize import FoundFiles, StoredFiles
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed, LoadStage
from serving.engine.hardware import compute_alone
from serving.engine.lora import HostAdapter, Unfit

# A folder with the right files, or files that tell by a check, once they are read, that they are.
Fetch = Callable[[AdapterRef], Path | FoundFiles]
Read = Callable[[Path | AdapterFiles, AdapterRef], HostAdapter]
Measure = Callable[[Path | AdapterFiles], int]  # bytes that Read takes at most, and leaves
Load = Future[HostAdapter]

FAILURE_SECONDS = 1.0  # a failed load is not tried again for this long
REFUSALS = 1024  # remembered, of adapters that do not fit the base and the settings
STAGES = ("fetch", "read")
WORKERS = 2  # a slow fetch does not hold up every other load


@dataclass(eq=False, slots=True)
class _Job:
    """A load that has not ended, for the workers."""

    number: int  # in the order in which they were asked for, in which they wait for room
    ref: AdapterRef
    future: ReferenceType[Load]
    load: Load | None  # None while it waits for room: it is given up where nobody else holds it
    files: Path | AdapterFiles | FoundFiles | None
    size: int = 0  # bytes that it takes at most, once they are known

    def close(self) -> None:
        """Let go of all memory. The pool holds the job itself a little longer."""
        if isinstance(self.files, FoundFiles):
            self.files.give_up()
        self.load = self.files = None


class AdapterLoader:
    """Loads each digest once at a time, and keeps the latest ones within `budget` bytes.

    What is on its way beside these takes `room` bytes at most, or is one adapter.
    """

    def __init__(
        self, fetch: Fetch, read: Read, measure: Measure, *, budget: int, room: int
    ) -> None:
        self._fetch, self._read, self._measure = fetch, read, measure
        self._budget, self._room = budget, room
        self.on_done: Callable[[], None] = lambda: None  # called on a worker after each load
        self._pool = ThreadPoolExecutor(WORKERS, "adapter-load", initializer=compute_alone)
        self._checks = ThreadPoolExecutor(WORKERS, "adapter-check")
        self._lock = Lock()
        self._numbers = count()
        # An ended load stays while somebody holds it: who asks before it is in a slot shares it.
        self._loads = WeakValueDictionary[str, Load]()
        self._taken = WeakKeyDictionary[Load, int]()  # bytes of those on their way
        self._line: list[_Job] = []  # those that wait for room, the first one first
        self._closed = False
        self._ahead: Load | None = None  # the latest one from files, until somebody asks for it
        self._failed: OrderedDict[str, tuple[float, Load]] = OrderedDict()
        self._refused: OrderedDict[AdapterRef, Load] = OrderedDict()
        self._cache: OrderedDict[str, tuple[int, Load]] = OrderedDict()  # digest → bytes, load
        self._bytes = 0
        self._counts: dict[str, int] = dict.fromkeys(STAGES, 0)
        self._seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)

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
            if ref in self._refused:
                return self._refused[ref]
            if ref.digest in self._failed:
                return self._failed[ref.digest][1]
            future = self._loads.get(ref.digest) or self._begin(ref, files)
            if files is not None:
                self._ahead = future
            elif future is self._ahead:
                self._ahead = None
            return future

    def advance(self) -> None:
        """Read what has room now; call it when somebody holds a load no more."""
        for job in self._next():
            self._submit(self._finish, job)

    @property
    def waits(self) -> bool:
        """Tell whether a load waits for room: whoever lets go of one may have told nobody."""
        with self._lock:
            return bool(self._line)

    @property
    def running(self) -> int:
        """How many loads have not ended, whether somebody waits for them or not."""
        with self._lock:
            return sum(not load.done() for load in self._loads.values())

    def has_room(self, size: int) -> bool:
        """Tell whether a load that takes so many bytes would be read at once."""
        with self._lock:
            return not self._line and self._fits(size)

    def before(self, digest: str) -> Collection[str]:
        """Return the loads that one which waits for room waits for; else nothing."""
        with self._lock:
            line = [job.ref.digest for job in self._line if job.future() is not None]
            if digest not in line:
                return ()
            taking = {each for each, load in self._loads.items() if self._taken.get(load)}
            return taking.union(line[: line.index(digest)])

    def cached_beside(self, digests: Container[str]) -> int:
        """Return how many adapters are in host memory beside these."""
        with self._lock:
            return sum(digest not in digests for digest in self._cache)

    def stages(self) -> tuple[LoadStage, ...]:
        """Return what fetches and reads took, failed ones too."""
        with self._lock:
            return tuple(
                LoadStage(name, self._counts[name], self._seconds[name]) for name in STAGES
            )

    def close(self) -> None:
        """Start no more loads. One that hangs in `fetch` must not hang whoever closes."""
        with self._lock:
            self._closed = True
        self._next()
        self._pool.shutdown(wait=False)  # jobs that it still has end at once
        self._checks.shutdown(wait=False)

    def _begin(self, ref: AdapterRef, files: AdapterFiles | None) -> Load:
        """Start a load. Under the lock."""
        future = self._loads[ref.digest] = Load()
        self._taken[future] = 0 if files is None else sum(map(len, files.weights))
        job = _Job(next(self._numbers), ref, ReferenceType(future), future, files)
        self._submit(self._run, job)
        return future

    def _submit(self, work: Callable[[_Job], None], job: _Job) -> None:
        try:
            self._pool.submit(work, job)
        except RuntimeError:  # it was closed a moment ago
            job.close()

    def _run(self, job: _Job) -> None:
        """Find out what a load takes, and read it, unless it has to wait: see `advance`."""
        if self._closed:
            job.close()
            return
        try:
            if job.files is None:
                with self._timed("fetch"):
                    job.files = self._fetch(job.ref)
            found = job.files
            job.size = self._measure(found.place if isinstance(found, FoundFiles) else found)
        except BaseException as error:
            self._fail(job, error)
            self._end(job)
            return
        self._line_up(job)
        ready = self._next()
        for other in ready:
            if other is not job:
                self._submit(self._finish, other)
        if job in ready:
            self._finish(job)

    def _line_up(self, job: _Job) -> None:
        with self._lock:
            assert job.load is not None
            del self._taken[job.load]
            job.load = None
            insort(self._line, job, key=attrgetter("number"))

    def _next(self) -> list[_Job]:
        """Take those out of the line that have room: in their order, up to one that has none."""
        ready, given_up = list[_Job](), list[_Job]()
        with self._lock:
            if self._closed:
                given_up, self._line = self._line, []
            while self._line:
                job = self._line[0]
                job.load = job.future()
                if job.load is None:
                    given_up.append(job)  # nobody waits for it any more
                elif self._make_room(job.size):
                    self._taken[job.load] = job.size
                    ready.append(job)
                else:
                    job.load = None
                    break
                del self._line[0]
        for job in given_up:  # files are removed, which nobody should wait for under the lock
            job.close()
        return ready

    def _make_room(self, size: int) -> bool:
        """Tell whether a load fits; what nobody has asked for yet makes way."""
        if not self._fits(size):
            self._ahead = None
        return self._fits(size)

    def _fits(self, size: int) -> bool:
        taken = sum(self._taken.values())
        return not taken or taken + size <= self._room

    def _finish(self, job: _Job) -> None:
        if self._closed:
            job.close()
            return
        try:
            self._settle(job, self._made(job))
        except BaseException as error:  # a panic in a library's Rust is no Exception; unsettled, it
            # would leave everybody who waits for this adapter waiting for ever
            self._fail(job, error)
        self._end(job)

    def _end(self, job: _Job) -> None:
        """Hold nothing of a load any more before others are looked for that have room now."""
        job.close()
        self.on_done()
        self.advance()

    def _made(self, job: _Job) -> HostAdapter:
        """Read and convert; where the bytes are to be checked, while that is done."""
        assert job.files is not None
        if not isinstance(job.files, FoundFiles):
            return self._timed_read(job.files, job.ref)
        with self._timed("fetch", 0):
            stored = self._stored(job, job.files)
        if isinstance(stored, Path):
            return self._timed_read(stored, job.ref)
        checked = self._checks.submit(stored.check)
        try:
            return self._timed_read(AdapterFiles(stored.config, [stored.weights]), job.ref)
        finally:
            checked.result()  # raises for the wrong bytes, whatever was made of them

    def _stored(self, job: _Job, found: FoundFiles) -> StoredFiles | Path:
        """Read the files; once more where they were swept while the load waited for room."""
        try:
            return found.read()
        except IntegrityError:
            if found.staging is None:
                raise
            job.files = again = self._fetch(job.ref)
            return again.read() if isinstance(again, FoundFiles) else again

    def _timed_read(self, source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        with self._timed("read"):
            return self._read(source, ref)

    @contextmanager
    def _timed(self, stage: str, times: int = 1) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._counts[stage] += times
                self._seconds[stage] += time.monotonic() - started

    def _settle(self, job: _Job, adapter: HostAdapter) -> None:
        assert job.load is not None
        with self._lock:
            job.load.set_result(adapter)
            self._keep(job.ref.digest, adapter.size_bytes, job.load)

    def _fail(self, job: _Job, error: BaseException) -> None:
        assert job.load is not None
        failure = error
        if not isinstance(failure, AdapterLoadFailed):
            failure = AdapterLoadFailed(f"{job.ref.label} cannot be fetched: {error}")
            failure.__cause__ = error
        _forget_frames(failure)
        with self._lock:
            del self._loads[job.ref.digest], self._taken[job.load]
            if isinstance(failure.__cause__, Unfit):
                self._refuse(job.ref, job.load)
            else:
                self._failed[job.ref.digest] = (time.monotonic(), job.load)
            job.load.set_exception(failure)

    def _refuse(self, ref: AdapterRef, load: Load) -> None:
        """Remember it for this name: who asks by another one hears nothing of it."""
        self._refused[ref] = load
        if len(self._refused) > REFUSALS:
            self._refused.popitem(last=False)

    def _keep(self, digest: str, size: int, load: Load) -> None:
        """Put a load into the cache; what leaves it is on its way again where somebody holds it."""
        self._cache[digest] = (size, load)
        self._taken.pop(load, None)
        self._bytes += size
        while self._bytes > self._budget:
            _, (evicted, gone) = self._cache.popitem(last=False)
            self._taken[gone] = evicted
            self._bytes -= evicted

    def _forget_failures(self) -> None:
        oldest = time.monotonic() - FAILURE_SECONDS
        while self._failed and next(iter(self._failed.values()))[0] < oldest:
            self._failed.popitem(last=False)


def _forget_frames(error: BaseException | None) -> None:
    """Let errors be kept without what the calls that raised them have read."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
