"""The thread that writes exposures: whatever the database does, every request gets its answer."""

import asyncio
from collections.abc import Sequence

import pytest

from registry.errors import StoreUnavailable
from serving.experiments.recorder import Recorder
from serving.experiments.store import Exposure, Outcome

ROW = Exposure("req_1", "exp_1", 0, "u", "acme", True)


class Rows:
    """The part of a store that is written to; `broken` is what the next writes meet."""

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.exposed: list[Exposure] = []
        self.ended: list[Outcome] = []

    def record(self, exposed: Sequence[Exposure], ended: Sequence[Outcome]) -> None:
        if self.broken:
            raise self.broken
        self.exposed += exposed
        self.ended += ended


@pytest.mark.parametrize("error", [StoreUnavailable("locked"), RuntimeError("unforeseen")])
def test_a_write_that_fails_is_told_and_the_next_one_succeeds(error: Exception) -> None:
    rows = Rows()
    recorder = Recorder(rows)  # type: ignore[arg-type]  # all that a recorder does with a store

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


def test_what_waits_when_it_stops_is_written_though_the_loop_is_closed() -> None:
    rows = Rows()
    recorder = Recorder(rows)  # type: ignore[arg-type]  # as above

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
