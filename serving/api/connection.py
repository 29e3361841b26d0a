"""One HTTP connection with the deadlines that uvicorn does not have.

Slow headers, and a client that stops reading, would hold a connection for ever. Both ends are
decided where the bytes are: no handler and no stream has to think of them.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api.errors import INVALID, Failure, Unavailable, failure_of
from serving.api.record import new_request_id
from serving.api.settings import ServerSettings

IDLE_CONNECTIONS = 4  # times max_requests: connections that wait for their next request


async def crowded(_scope: Any, _receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
    """Answer every request of a connection that is one too many."""
    failure = failure_of(Unavailable("This server has too many connections. Try again."))
    body = failure.body(new_request_id())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **failure.headers,
    }
    written = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": written})
    await send({"type": "http.response.body", "body": body})


class Connection(H11Protocol):
    """uvicorn's h11 protocol; `settings` is set by the subclass that `connection_class` makes."""

    settings: ServerSettings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._await_headers()
        if len(self.connections) > self.settings.max_requests * IDLE_CONNECTIONS:
            self.app = crowded  # uvicorn's own refusal does not say when to come back

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif self._between_requests and self._header_timer is None:
            self._await_headers()  # the first bytes of the next request on this connection

    @property
    def _between_requests(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.settings.header_timeout, self._abort)

    def pause_writing(self) -> None:
        """The client reads slower than we write: it has `stall_timeout` to catch up."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.settings.stall_timeout, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP in the same envelope as every other error."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            return self._abort()  # an answer is on its way: a second one would end up inside it
        failure = Failure(400, INVALID, "invalid_http", msg)
        body = failure.body(new_request_id())
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        return None

    def _abort(self) -> None:
        # Not close(): that would wait until a client that does not read has read everything.
        self.transport.abort()


def connection_class(settings: ServerSettings) -> type[asyncio.Protocol]:
    """Return the protocol class for uvicorn, which makes the instances itself."""
    return cast("Any", type("Connection", (Connection,), {"settings": settings}))
