"""The outermost layer: what no handler should have to think about.

Every request gets an id, a record, bounds on headers and body, a deadline for the body, and one
log line at its end. Requests whose framing two parsers could read differently are refused.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from serving.api.door import Door
from serving.api.drain import Drain
from serving.api.errors import TABLE, ClientGone, Failure, RequestError, Unavailable, failure_of
from serving.api.hosts import tenant_of_host
from serving.api.metrics import Metrics
from serving.api.record import SCOPE_KEY, RequestRecord, new_request_id
from serving.api.request_log import entry_of
from serving.api.settings import ServerSettings
from serving.engine.boundary import EngineBusy
from serving.logs.writer import LogWriter

PUSH_PATH = re.compile(r"/v1/adapters/[^/]+/[^/]+/versions")  # its bodies are files
ALWAYS_ANSWERED = ("/health/live", "/health/ready")  # also while draining or overloaded
DISCARD_SECONDS = 5.0
DISCARD_BYTES = 32 * 1024 * 1024

CLOSE = ((b"connection", b"close"),)  # what was sent may not be what a second parser reads

Headers = Iterable[tuple[bytes, bytes]]


class Guard:
    """An ASGI app around another one."""

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        door: Door,
        drain: Drain,
        metrics: Metrics,
        log_writer: LogWriter,
    ) -> None:
        self._app = app
        self._settings = settings
        self._door = door
        self._drain = drain
        self._metrics = metrics
        self._log_writer = log_writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await _close_websocket(send)
        record = RequestRecord(new_request_id(), scope["method"], scope["path"])
        cast("dict[str, Any]", scope)[SCOPE_KEY] = record
        expects = any(name == b"expect" for name, _ in scope["headers"])
        body = _Body(receive, *self._bounds(scope), discards=not expects)
        respond = _Responder(send, record, body)
        try:
            with self._drain.request():
                self._check(scope, record)
                self._door.check(scope, record)
                await self._app(scope, body.receive, respond)
                if record.outcome == TABLE[EngineBusy].code:
                    self._door.turned_away(scope, record)
        except (RequestError, Unavailable) as error:
            await respond.failure(failure_of(error), *CLOSE)
        except EngineBusy as error:
            await respond.failure(failure_of(error))
        except ClientGone:
            record.outcome = record.outcome or "disconnect"
        finally:
            record.write()
            self._metrics.finished(record, scope)
            self._log(record, scope)

    def _log(self, record: RequestRecord, scope: HTTPScope) -> None:
        if scope["path"] in ALWAYS_ANSWERED:
            return  # probes ask all the time and ask for nothing
        said = record.transcript.contents() if record.transcript else None
        self._log_writer.take(entry_of(record, scope), said)

    def _bounds(self, scope: HTTPScope) -> tuple[int, float]:
        """Return the most bytes of the body and the seconds it may take."""
        settings = self._settings
        if PUSH_PATH.fullmatch(scope["path"]):
            return settings.max_push_bytes, settings.push_timeout
        return settings.max_body_bytes, settings.body_timeout

    def _check(self, scope: HTTPScope, record: RequestRecord) -> None:
        headers = scope["headers"]
        _check_size(headers, self._settings)
        _check_framing(headers, self._bounds(scope)[0])
        always = scope["path"] in ALWAYS_ANSWERED
        if self._checks_host(always):
            host = next(value for name, value in headers if name == b"host").decode("latin-1")
            record.host_tenant = tenant_of_host(host, self._settings.hosts)
        if always:
            return
        if self._drain.draining:
            raise Unavailable("This server is shutting down. Try again in a moment.")
        if self._drain.in_flight > self._settings.max_requests:
            raise Unavailable(
                f"More than {self._settings.max_requests} requests are in flight. Try again."
            )

    def _checks_host(self, always: bool) -> bool:
        """Without keys, a web page whose name was bound to 127.0.0.1 must not get in.

        With keys, health tells an anonymous caller nothing, and a prober knows an address only.
        """
        return not self._settings.auth or (bool(self._settings.hosts) and not always)


def _check_size(headers: Headers, settings: ServerSettings) -> None:
    sizes = [len(name) + len(value) + 4 for name, value in headers]
    if len(sizes) > settings.max_headers or sum(sizes) > settings.max_header_bytes:
        raise RequestError(
            f"{len(sizes)} headers of {sum(sizes)} bytes; at most {settings.max_headers} headers "
            f"of {settings.max_header_bytes} bytes are taken.",
            code="headers_too_large",
            status=431,
        )


def _check_framing(headers: Headers, max_body_bytes: int) -> None:
    names = [name for name, _ in headers]
    if names.count(b"host") != 1:
        raise RequestError("Send exactly one Host header.", code="invalid_framing")
    if b"transfer-encoding" in names and b"content-length" in names:
        raise RequestError(
            "Send either Content-Length or Transfer-Encoding, not both.", code="invalid_framing"
        )
    length = next((value for name, value in headers if name == b"content-length"), b"0")
    if int(length) > max_body_bytes:  # the server in front has checked that it is a number
        raise too_large(max_body_bytes)


def too_large(limit: int) -> RequestError:
    return RequestError(
        f"The body is longer than {limit} bytes.", code="request_too_large", status=413
    )


class _Body:
    """Counts the body and holds it to its deadline."""

    def __init__(self, receive: Receive, limit: int, timeout: float, *, discards: bool) -> None:
        self._receive = receive
        self._discards = discards  # a client that waits for `100 Continue` has sent nothing
        self._limit = limit  # bytes
        self._timeout = timeout  # seconds
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._read = 0
        self.complete = False

    async def receive(self) -> Any:
        if self.complete:
            return await self._receive()  # only the disconnect is left to come
        try:
            async with asyncio.timeout_at(self._deadline):
                message: Any = await self._receive()
        except TimeoutError:
            self._discards = False  # it had its time
            raise RequestError(
                f"The body did not arrive within {self._timeout:.0f} seconds.",
                code="request_timeout",
                status=408,
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        self._read += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self._read > self._limit:
            raise too_large(self._limit)
        return message

    async def discard(self) -> None:
        """Read what the client still sends: one that is writing cannot see our answer."""
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while self._discards and not self.complete and self._read < DISCARD_BYTES:
                    message: Any = await self._receive()
                    self._read += len(message.get("body", b""))
                    gone = message["type"] == "http.disconnect"
                    self.complete = gone or not message.get("more_body", False)
        except TimeoutError:
            self.complete = True  # it had its chance


class _Responder:
    """The send of one request: adds the id, notes the status, lets refused clients finish."""

    def __init__(self, send: Send, record: RequestRecord, body: _Body) -> None:
        self._send = send
        self._record = record
        self._body = body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message["headers"] = [
                *message["headers"],
                (b"x-request-id", self._record.request_id.encode()),
                *(self._record.lease.headers if self._record.lease else ()),
            ]
            if message["status"] >= 400:
                await self._body.discard()
        await self._send(message)

    async def failure(self, failure: Failure, *more: tuple[bytes, bytes]) -> None:
        self._record.outcome = failure.code
        body = failure.body(self._record.request_id)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *more,
            *((name.encode(), value.encode()) for name, value in failure.headers.items()),
        ]
        start: Any = {"type": "http.response.start", "status": failure.status, "headers": headers}
        await self(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


async def _close_websocket(send: Callable[[Any], Awaitable[None]]) -> None:
    await send({"type": "websocket.close", "code": 1000, "reason": ""})
