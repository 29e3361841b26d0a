"""The thread that writes exposures: whatever the database does, every request gets its answer."""

import asyncio
import gc
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import pytest

from registry.errors import IntegrityError, StoreUnavailable
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.recorder import Recorder

ROW = Exposure("req_1", "exp_1", 0, "u", "acme", True)


class Rows:
    """The part of a store that is written to; `broken` is what the next writes meet."""

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.exposed: list[Exposure] = []
        self.ended: list[Outcome] = []
        self.free = threading.Event()  # cleared: another process holds the database
        self.free.set()
        self.asked = threading.Event()

    @contextmanager
    def recording(self) -> Generator[Callable[[Sequence[Exposure], Sequence[Outcome]], None]]:
        self.asked.set()
        self.free.wait(10)
        if self.broken:
            raise self.broken
        yield self._write

    def _write(self, exposed: Sequence[Exposure], ended: Sequence[Outcome]) -> None:
        self.exposed += exposed
        self.ended += ended


def recording(rows: Rows) -> Recorder:
    return Recorder(rows)  # type: ignore[arg-type]  # all that a recorder does with a store


@pytest.mark.parametrize("error", [StoreUnavailable("locked"), RuntimeError("unforeseen")])
def test_a_write_that_fails_is_told_and_the_next_one_succeeds(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.experiments.recorder.EXPOSE_SECONDS", 5)  # a busy machine is slow
    rows = Rows()
    recorder = recording(rows)

    async def scenario() -> None:
        rows.broken = error
        with pytest.raises(StoreUnavailable, match=str(error)):
            async with asyncio.timeout(5):
                await recorder.expose(ROW)
        rows.broken = None
        async with asyncio.timeout(5):
            await recorder.expose(ROW)

    recorder.start()
    asyncio.run(scenario())
    recorder.stop()
    assert rows.exposed == [ROW]


def test_a_request_does_not_wait_for_a_held_database_and_its_row_is_never_written() -> None:
    rows = Rows()
    recorder = recording(rows)
    rows.free.clear()

    async def scenario() -> None:
        with pytest.raises(StoreUnavailable, match="not free within"):
            async with asyncio.timeout(8):  # the database is held for longer than that
                await recorder.expose(ROW)
        rows.free.set()

    recorder.start()
    asyncio.run(scenario())
    recorder.stop()
    assert rows.exposed == [], "who got production is not counted later on"


def test_a_failure_that_comes_when_nobody_waits_any_more_is_no_unheard_exception() -> None:
    rows = Rows()
    recorder = recording(rows)
    rows.free.clear()
    unheard: list[str] = []

    async def give_up() -> None:
        gone = asyncio.create_task(recorder.expose(ROW))
        await asyncio.sleep(0)
        gone.cancel()
        ends = await asyncio.gather(gone, recorder.expose(ROW), return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError, StoreUnavailable]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: unheard.append(context["message"]))
        await give_up()
        rows.broken = StoreUnavailable("locked")
        rows.free.set()
        await asyncio.to_thread(recorder.stop)
        await asyncio.sleep(0)  # for what the thread has told this loop
        rows.broken = None  # whose traceback would keep all of it alive
        gc.collect()

    recorder.start()
    asyncio.run(scenario())
    assert unheard == []


def test_a_row_that_is_being_written_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of the race: once the thread took it, the request must not go without it."""
    rows = Rows()
    recorder = recording(rows)
    writing, go_on = threading.Event(), threading.Event()

    def write(exposed: Sequence[Exposure], ended: Sequence[Outcome]) -> None:
        writing.set()
        assert go_on.wait(10)
        rows.exposed += exposed

    async def patience_ends(*_: object, **__: object) -> None:
        """Come to its end just when the row has been taken."""
        assert await asyncio.to_thread(writing.wait, 10)

    monkeypatch.setattr(rows, "_write", write)
    monkeypatch.setattr("serving.experiments.recorder.asyncio.wait", patience_ends)

    async def scenario() -> None:
        exposing = asyncio.create_task(recorder.expose(ROW))
        assert await asyncio.to_thread(writing.wait, 10)
        await asyncio.sleep(0.02)
        assert not exposing.done()
        go_on.set()
        await exposing

    recorder.start()
    asyncio.run(scenario())
    recorder.stop()
    assert rows.exposed == [ROW]


def test_outcomes_are_kept_until_the_database_is_there_again() -> None:
    rows = Rows()
    recorder = recording(rows)
    ended = Outcome("req_1", False, 1.0, 1)
    rows.broken = StoreUnavailable("locked")
    recorder.start()
    recorder.end(ended)
    assert rows.asked.wait(10)
    rows.broken = None
    recorder.stop()
    assert rows.ended == [ended]


def test_an_outcome_that_the_database_refuses_stops_no_other() -> None:
    rows = Rows()
    recorder = recording(rows)
    rows.broken = IntegrityError("no such exposure")
    recorder.start()
    recorder.end(Outcome("req_unknown", False, 1.0, 1))
    assert rows.asked.wait(10)

    async def scenario() -> None:
        with pytest.raises(IntegrityError):
            await recorder.expose(ROW)
        rows.broken = None
        await recorder.expose(ROW)

    asyncio.run(scenario())
    recorder.stop()
    assert (rows.exposed, rows.ended) == ([ROW], [])


def test_what_waits_when_it_stops_is_written_though_the_loop_is_closed() -> None:
    rows = Rows()
    recorder = recording(rows)

    async def scenario() -> None:
        task = asyncio.create_task(recorder.expose(ROW))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(scenario())
    ended = [Outcome(f"req_{number}", False, 1.0, 1) for number in range(1200)]
    for row in ended:
        recorder.end(row)
    recorder.start()
    recorder.stop()
    assert (rows.exposed, rows.ended) == ([ROW], ended)
