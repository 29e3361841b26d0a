"""The endpoints as this server answers them now.

A change is followed as a move of an alias is: what it points at is loaded and checked first, and
until then, or when that fails, the endpoint goes on as it was. An alias is live already, or
becomes so by itself, so that only a pinned version has to be made ready here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from registry.adapter import AdapterName, Version
from registry.base import BaseModel
from registry.errors import EndpointNotFound, InvalidName, StoreUnavailable, WardrobeError
from registry.records import Endpoint
from registry.store import Registry
from serving.tenants.access import owns
from serving.tenants.keys import Principal

READY_SECONDS = 120.0  # a version that is not ready by then has failed
RETRY_SECONDS = 1.0  # while the registry cannot be read

log = logging.getLogger("wardrobe.endpoints")


class LiveEndpoints:
    """Kept in step with the registry by whoever calls `follow`."""

    def __init__(
        self,
        registry: Registry,
        base: BaseModel,
        make_ready: Callable[[Version], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._base = base
        self._make_ready = make_ready
        self._seq = 0
        self._live: dict[AdapterName, Endpoint] = {}
        self._failures: dict[AdapterName, str] = {}
        self._changes: dict[AdapterName, asyncio.Task[None]] = {}

    @property
    def failures(self) -> Mapping[AdapterName, str]:
        """Endpoints whose last change could not be followed, and why."""
        return self._failures

    def all(self) -> list[Endpoint]:
        """Return every endpoint, by name."""
        return sorted(self._live.values(), key=lambda endpoint: str(endpoint.name))

    def of(self, model: str, principal: Principal) -> Endpoint | None:
        """Return the caller's endpoint that a request's `model` names, if it names one."""
        try:
            name = AdapterName.parse(model, principal.namespace)
        except InvalidName:
            return None  # a selector with an @, or nothing that is a name at all
        return self._live.get(name) if owns(principal, name) else None

    async def start(self) -> None:
        """Take the endpoints as they are; their versions load with their first request."""
        self._seq = await asyncio.to_thread(self._registry.last_endpoint_event)
        found = await asyncio.to_thread(self._registry.endpoints)
        self._live = {endpoint.name: endpoint for endpoint in found}

    async def stop(self) -> None:
        tasks = list(self._changes.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self) -> None:
        """Begin to take up what was changed since the last call. Raises StoreUnavailable."""
        events = await asyncio.to_thread(self._registry.endpoint_events, self._seq)
        for name in {event.name for event in events}:
            older = self._changes.get(name)
            task = asyncio.create_task(self._take_up(name, older))
            self._changes[name] = task
            task.add_done_callback(partial(self._ended, name))
        if events:
            self._seq = events[-1].seq

    def _ended(self, name: AdapterName, task: asyncio.Task[None]) -> None:
        if self._changes.get(name) is task:
            del self._changes[name]
        if not task.cancelled() and (error := task.exception()):
            log.error("an endpoint could not be followed", exc_info=error)

    async def _take_up(self, name: AdapterName, older: "asyncio.Task[None] | None") -> None:
        if older is not None:  # it must not answer last
            older.cancel()
            await asyncio.wait([older])
        while not await self._took_up(name):  # noqa: ASYNC110  # polls a database that is away
            await asyncio.sleep(RETRY_SECONDS)

    async def _took_up(self, name: AdapterName) -> bool:
        """Answer the endpoint as the registry has it, or note why not; False: ask again."""
        try:
            endpoint = await asyncio.to_thread(self._registry.endpoint, name)
            async with asyncio.timeout(READY_SECONDS):
                await self._prepare(endpoint)
        except EndpointNotFound:
            self._live.pop(name, None)
            self._failures.pop(name, None)
        except StoreUnavailable:
            return False
        except TimeoutError:
            self._fail(name, f"not ready after {READY_SECONDS:.0f} seconds")
        except WardrobeError as error:
            self._fail(name, error.message)
        else:
            # One assignment: a request sees the old endpoint or the new one, nothing between.
            self._live[name] = endpoint
            self._failures.pop(name, None)
            log.info("endpoint=%s model=%s", name, endpoint.model)
        return True

    async def _prepare(self, endpoint: Endpoint) -> None:
        if endpoint.target is None or endpoint.target.alias is not None:
            return
        version = await asyncio.to_thread(self._registry.resolve, endpoint.target)
        if version.base_id == self._base.id:  # else other servers answer it
            await self._make_ready(version)

    def _fail(self, name: AdapterName, sentence: str) -> None:
        self._failures[name] = sentence
        log.error("endpoint=%s goes on as it was: %s", name, sentence)
