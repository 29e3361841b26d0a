"""Runs the application: one process, one event loop, and an end that cuts nobody off.

SIGTERM or SIGINT: readiness says 503, new requests get 503, running answers go on for up to
`drain_timeout`; what is left then ends with an error event. A second signal ends them at once.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import replace

import uvicorn
from litestar import Litestar

from registry.base import BaseModel
from registry.store import Registry
from serving.api.app import create_app
from serving.api.connection import connection_class
from serving.api.drain import Drain
from serving.api.services import services_of
from serving.api.settings import KIB, ServerSettings
from serving.engine.boundary import Engine
from serving.tokens import Tokens

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SWITCH_SECONDS = 0.0001  # that a thread keeps the interpreter for itself while a step waits for it
CUT_SECONDS = 2.0  # for the error events of answers that were cut
BACKLOG = 2048
# More than clients and balancers keep an idle connection (15 s in aiohttp, 60 in many balancers):
# whoever gives up last must not be the one that sends, or a request meets a closed connection.
KEEP_ALIVE_SECONDS = 75

log = logging.getLogger("wardrobe.server")


def serve(
    listener: socket.socket,
    settings: ServerSettings,
    registry: Registry,
    engine: Engine,
    base: BaseModel,
    tokens: Tokens,
    *,
    on_start: Callable[[str], None],
) -> None:
    """Serve at what `listen` returned until a signal. Closes engine and tokens.

    Calls `on_start(url)` when the port answers.
    """
    with closing(tokens):
        settings = replace(settings, port=listener.getsockname()[1])
        app = create_app(settings, registry, engine, base, tokens)
        server = DrainingServer(app, settings, on_start)
        # What is here now stays: to walk it all again would stop every stream for 0.4 seconds.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_SECONDS)
        server.run(sockets=[listener])  # on uvloop, where there is one


class DrainingServer(uvicorn.Server):
    """uvicorn with our own end. It goes on accepting while it drains, to say 503 and why."""

    def __init__(
        self, app: Litestar, settings: ServerSettings, on_start: Callable[[str], None]
    ) -> None:
        super().__init__(_uvicorn_config(app, settings))
        self._settings = settings
        self._drain: Drain = services_of(app).drain
        self._on_start = on_start
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start(self._settings.url)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals only ever reach the main thread
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Begin to drain; the second call cuts what still runs."""
        if self._ending is None:
            log.info("draining in_flight=%d", self._drain.in_flight)
            self._drain.begin()
            self._ending = asyncio.create_task(self._end())
        else:
            self._drain.cut()

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self._drain.finished()
        except TimeoutError:
            log.warning("cutting in_flight=%d", self._drain.in_flight)
            self._drain.cut()
            try:
                async with asyncio.timeout(CUT_SECONDS):
                    await self._drain.finished()
            except TimeoutError:
                log.error("leaving in_flight=%d", self._drain.in_flight)
        self.should_exit = True


def _uvicorn_config(app: Litestar, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # the guard writes one line for each request
        server_header=False,
        date_header=False,
        proxy_headers=False,  # nothing here believes X-Forwarded-*
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,  # the drain is over by then
        h11_max_incomplete_event_size=64 * KIB,
    )
