"""Follows the registry's endpoints as aliases are followed.

What a changed endpoint points at is loaded and checked first, and until then, or when that fails,
it goes on as it was. Of one endpoint only the newest change counts.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from registry.adapter import AdapterName, Version
from registry.errors import BaseMismatch, EndpointNotFound, StoreUnavailable, WardrobeError
from registry.records import Endpoint
from registry.store import Registry
from serving.endpoints import LiveEndpoints
from serving.routing import ModelStillLoads, Router

READY_SECONDS = 120.0  # a version that is not ready by then has failed
RETRY_SECONDS = 1.0

log = logging.getLogger("wardrobe.endpoints")


class EndpointFollower:
    """Keeps the live endpoints in step with the registry, whenever `follow` is called."""

    def __init__(
        self,
        registry: Registry,
        router: Router,
        make_ready: Callable[[Version], Awaitable[None]],
        live: LiveEndpoints,
    ) -> None:
        self._registry = registry
        self._router = router
        self._make_ready = make_ready
        self._live = live
        self._seq = 0
        self._changes: dict[AdapterName, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Take the endpoints as they are; their versions load with their first request."""
        self._seq = await asyncio.to_thread(self._registry.last_endpoint_event)
        found = await asyncio.to_thread(self._registry.endpoints)
        self._live.known = {endpoint.name: endpoint for endpoint in found}

    async def stop(self) -> None:
        tasks = list(self._changes.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self) -> bool:
        """Begin to take up what was changed since the last call; tell whether it was anything.

        Raises StoreUnavailable.
        """
        events = await asyncio.to_thread(self._registry.endpoint_events, self._seq)
        for name in {event.name for event in events}:
            older = self._changes.get(name)
            task = asyncio.create_task(self._take_up(name, older))
            self._changes[name] = task
            task.add_done_callback(partial(self._ended, name))
        if events:
            self._seq = events[-1].seq
        return bool(events)

    def _ended(self, name: AdapterName, task: asyncio.Task[None]) -> None:
        if self._changes.get(name) is task:
            del self._changes[name]

    async def _take_up(self, name: AdapterName, older: "asyncio.Task[None] | None") -> None:
        if older is not None:  # it must not be the last to write
            older.cancel()
            await asyncio.wait([older])
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._take(name)
        except TimeoutError:
            self._fail(name, f"not ready after {READY_SECONDS:.0f} seconds")
        except WardrobeError as error:
            self._fail(name, error.message)
        except Exception as error:
            log.exception("an endpoint could not be followed in an unforeseen way")
            self._fail(name, f"{type(error).__name__}: {error}")

    async def _take(self, name: AdapterName) -> None:
        """Answer the endpoint as the registry has it. Tries again while only waiting can help."""
        while True:
            try:
                endpoint = await asyncio.to_thread(self._registry.endpoint, name)
                # A new one has nothing to go on as: its requests wait, or hear why it cannot be.
                self._live.known.setdefault(name, endpoint)
                await self._prepare(endpoint)
            except EndpointNotFound:
                self._live.known.pop(name, None)
                self._live.failures.pop(name, None)
                return
            except (StoreUnavailable, ModelStillLoads):
                await asyncio.sleep(RETRY_SECONDS)
            else:
                # One assignment: a request sees the old one or the new one, nothing between.
                self._live.known[name] = endpoint
                self._live.failures.pop(name, None)
                log.info("endpoint=%s model=%s", name, endpoint.model)
                return

    async def _prepare(self, endpoint: Endpoint) -> None:
        """Return when the endpoint can be answered: an alias is live, or its version is ready."""
        try:
            version = await self._router.version_of(endpoint)
        except BaseMismatch:
            return  # other servers answer it; this one says so
        if version is not None and endpoint.target and endpoint.target.alias is None:
            await self._make_ready(version)

    def _fail(self, name: AdapterName, sentence: str) -> None:
        self._live.failures[name] = sentence
        log.error("endpoint=%s goes on as it was: %s", name, sentence)
