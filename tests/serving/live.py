"""A whole server in a thread, on a free loopback port, with a scripted engine behind it."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.store import Registry
from serving.api.app import create_app
from serving.api.listener import listen
from serving.api.server import DrainingServer
from serving.api.services import Services, services_of
from serving.api.settings import ServerSettings
from serving.tenants.keys import rotate_operator_key
from serving.tokens import Tokens
from tests.registry.making import BASE_ID, make_adapter, make_base
from tests.serving.scripted import ScriptedEngine

NAME = AdapterName("acme", "support")
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}


def eventually(happened: Callable[[], Any], seconds: float = 60) -> Any:
    """Ask until the answer is true; return it."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


@dataclass(slots=True)
class Wardrobe:
    """A registry with what a test pushes into it."""

    registry: Registry
    base: BaseModel
    folder: Path
    pushed: int = 0

    def push(self, name: AdapterName = NAME, *, promote: bool = True) -> str:
        """Push one more version; return its digest."""
        self.pushed += 1
        source = make_adapter(self.folder / f"adapter-{self.pushed}", seed=self.pushed)
        version = self.registry.push(source, name, actor="test").version
        if promote:
            self.promote(version.number, name)
        return version.digest

    def promote(self, number: int, name: AdapterName = NAME) -> None:
        self.registry.promote(name, number, reason="test", actor="test", force=True)


@contextmanager
def opened(folder: Path) -> Iterator[Wardrobe]:
    """An empty registry with one base, in an empty folder."""
    bases = Bases(folder / "bases")
    base = bases.add(BASE_ID, make_base(folder / "prepared"), origin="test")
    with Registry.open(folder / "home", bases) as registry:
        yield Wardrobe(registry, base, folder)


@dataclass(slots=True)
class Running:
    """A server that runs now."""

    url: str
    key: str
    engine: ScriptedEngine
    services: Services
    server: DrainingServer
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    clients: ExitStack = field(default_factory=ExitStack)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=30, **options)

    def openai(self, **options: Any) -> OpenAI:
        """Return a client whose connections are closed before the server is stopped."""
        settings = {"api_key": self.key, "max_retries": 0, "timeout": 30.0} | options
        return self.clients.enter_context(OpenAI(base_url=f"{self.url}/v1", **settings))

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.server.stop)


@contextmanager
def running(
    wardrobe: Wardrobe,
    tokens: Tokens,
    engine: ScriptedEngine | None = None,
    **changes: Any,
) -> Iterator[Running]:
    engine = engine or ScriptedEngine()
    settings = replace(ServerSettings(port=0, drain_timeout=1.0), **changes)
    key = rotate_operator_key(wardrobe.registry)
    with listen(settings) as listener:
        settings = replace(settings, port=listener.getsockname()[1])
        app = create_app(settings, wardrobe.registry, engine, wardrobe.base, tokens)
        started = threading.Event()
        loops: list[asyncio.AbstractEventLoop] = []
        server = DrainingServer(app, settings, lambda _: started.set())

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        def run() -> None:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(main())

        thread = threading.Thread(target=run)
        thread.start()
        assert started.wait(10), "the server did not start"
        live = Running(settings.url, key, engine, services_of(app), server, thread, loops[0])
        try:
            with live.clients:
                yield live
        finally:
            if thread.is_alive():
                live.stop()
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"
