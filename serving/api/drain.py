"""The end of a server: refuse what is new, let what runs finish, then cut what is left cleanly."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from litestar.types import Receive

from serving.api.errors import ClientGone, Unavailable

POLL_SECONDS = 0.02


class Drain:
    """Counts requests in flight and can end their answers. Belongs to one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._cut = False
        self._lifelines: set[asyncio.Timeout] = set()

    @contextmanager
    def request(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def begin(self) -> None:
        self.draining = True

    async def finished(self) -> None:
        """Return when nothing is in flight."""
        while self.in_flight:  # noqa: ASYNC110  # a poll of an end that happens once
            await asyncio.sleep(POLL_SECONDS)

    def cut(self) -> None:
        """End every running answer now."""
        self.draining = self._cut = True
        for line in self._lifelines:
            line.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def lifeline(self, receive: Receive) -> AsyncIterator[None]:
        """Run a body that ends when its client goes (ClientGone) or is cut (Unavailable).

        Both reach the body as a cancellation wherever it waits, so its `finally` blocks run.
        """
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            line.reschedule(asyncio.get_running_loop().time())

        line = asyncio.timeout(0 if self._cut else None)
        try:
            async with line:
                self._lifelines.add(line)
                watcher = asyncio.create_task(watch())
                try:
                    yield
                finally:
                    self._lifelines.discard(line)
                    watcher.cancel()
        except TimeoutError:
            if not line.expired():
                raise
            if gone:
                raise ClientGone from None
            raise Unavailable("This server is shutting down and ended the answer.") from None
