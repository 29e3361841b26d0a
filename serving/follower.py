"""Follows the registry: warms what an alias was moved to, checks it, then flips the live table.

The order of one alias move (a promote or a rollback, by whichever process):

    registry event → report "warming" → engine.warm → self-check → live table → report "live"

Until the flip the old version answers; when a step fails it goes on answering and the failure is
reported. Aliases roll out side by side. Of one alias only the newest move counts: it stops an
older one that is still warming and waits for its end, so an older version can never flip last.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from registry.adapter import Selector, Version
from registry.base import BaseModel
from registry.errors import StoreUnavailable, WardrobeError
from registry.records import Event, RolloutState
from registry.store import Registry
from serving.endpoint_follower import EndpointFollower
from serving.engine.boundary import Engine
from serving.routing import AliasKey, FailedRollout, LiveTable
from serving.selfcheck import make_ready
from serving.tokens import Tokens

POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 1.0
ROLLOUT_SECONDS = 120.0  # a version that is not live by then has failed

log = logging.getLogger("wardrobe.rollout")


class Follower:
    """Keeps a live table in step with the registry, from `start` to `stop`."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        tokens: Tokens,
        base: BaseModel,
        live: LiveTable,
        endpoints: EndpointFollower,
        *,
        server_id: str,
        url: str,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._tokens = tokens
        self._base = base
        self._live = live
        self._endpoints = endpoints
        self._server_id = server_id
        self._url = url
        self._seq = 0
        self._seen: int | None = None  # the registry's revision, behind which nothing is new
        self._writing = asyncio.Lock()  # else a locked database could take every thread there is
        self._rollouts: dict[AliasKey, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take the aliases as they are; their versions load with their first request."""
        self._seq, self._live.versions = await asyncio.to_thread(self._snapshot)
        await self._endpoints.start()
        self._live.read_at = time.monotonic()
        self._loops = [
            asyncio.create_task(self._repeat(self._follow, POLL_SECONDS)),
            asyncio.create_task(self._repeat(self._heartbeat, HEARTBEAT_SECONDS)),
        ]

    async def stop(self) -> None:
        tasks = [*self._loops, *self._rollouts.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._endpoints.stop()

    def _snapshot(self) -> tuple[int, dict[AliasKey, Version]]:
        # The number first: a move in between is then seen twice, which does no harm.
        seq = self._registry.last_event()
        aliased = self._registry.aliased(self._base.id)
        return seq, {(version.name, alias): version for alias, version in aliased}

    async def _repeat(self, step: Callable[[], Any], seconds: float) -> None:
        while True:
            try:
                await step()
            except StoreUnavailable as error:
                log.warning("the registry cannot be read, known aliases go on: %s", error.message)
            except Exception:
                # Following must outlive any surprise; readiness shows that the table is stale.
                log.exception("following the registry failed, trying again")
            await asyncio.sleep(seconds)

    async def _heartbeat(self) -> None:
        await self._write(partial(self._registry.heartbeat, self._server_id, self._url))

    async def _write(self, call: Callable[[], None]) -> None:
        async with self._writing:
            await asyncio.to_thread(call)

    async def _follow(self) -> None:
        revision = self._registry.revision()
        if revision is None or revision != self._seen:
            more = await self._take_up()
            self._seen = None if more else revision
        self._live.read_at = time.monotonic()

    async def _take_up(self) -> bool:
        """Take up what was moved since the last time; tell whether it was anything."""
        events = await asyncio.to_thread(self._registry.events, self._seq)
        newest = {(e.name, e.alias): e for e in events if e.alias is not None}
        for (name, alias), event in newest.items():
            self._begin((name, alias), event)
        if events:
            self._seq = events[-1].seq
        return await self._endpoints.follow() or bool(events)

    def _begin(self, key: AliasKey, event: Event) -> None:
        older = self._rollouts.get(key)
        if older is not None:
            older.cancel()
        task = asyncio.create_task(self._roll_out(key, event, older))
        self._rollouts[key] = task
        task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: AliasKey, task: asyncio.Task[None]) -> None:
        if self._rollouts.get(key) is task:
            del self._rollouts[key]
        if not task.cancelled() and (error := task.exception()):
            log.error("a rollout ended unexpectedly", exc_info=error)

    async def _roll_out(
        self, key: AliasKey, event: Event, older: "asyncio.Task[None] | None"
    ) -> None:
        if older is not None:
            await asyncio.wait([older])
        started = time.monotonic()
        report = partial(self._report, key, event)
        try:
            async with asyncio.timeout(ROLLOUT_SECONDS):
                version = await asyncio.to_thread(
                    self._registry.resolve, Selector(event.name, number=event.number)
                )
                if version.base_id != self._base.id:
                    return self._leave(key)  # to the servers of that base
                await report("warming")
                await make_ready(self._engine, self._tokens, version)
        except TimeoutError:
            await self._fail(key, event, f"not ready after {ROLLOUT_SECONDS:.0f} seconds", started)
        except WardrobeError as error:
            await self._fail(key, event, str(error), started)
        except Exception as error:
            log.exception("a rollout failed in an unforeseen way")
            await self._fail(key, event, f"{type(error).__name__}: {error}", started)
        else:
            # One assignment: a request sees the old version or the new one, nothing between.
            self._live.versions[key] = version
            self._live.failures.pop(key, None)
            seconds = time.monotonic() - started
            log.info("live label=%s alias=%s seconds=%.3f", version.ref.label, key[1], seconds)
            await report("live", seconds=seconds)

    def _leave(self, key: AliasKey) -> None:
        """Forget an alias that moved to another base, as if this server started now."""
        self._live.versions.pop(key, None)
        self._live.failures.pop(key, None)

    async def _fail(self, key: AliasKey, event: Event, sentence: str, started: float) -> None:
        self._live.failures[key] = FailedRollout(event.name, key[1], event.number, sentence)
        log.error("rollout failed name=%s v%d: %s", event.name, event.number, sentence)
        seconds = time.monotonic() - started
        await self._report(key, event, "failed", message=sentence, seconds=seconds)

    async def _report(
        self,
        key: AliasKey,
        event: Event,
        state: RolloutState,
        *,
        message: str = "",
        seconds: float = 0.0,
    ) -> None:
        call = partial(
            self._registry.report_rollout,
            self._server_id,
            event.name,
            key[1],
            event_seq=event.seq,
            number=event.number,
            digest=event.digest,
            state=state,
            message=message,
            seconds=seconds,
        )
        try:
            await self._write(call)
        except StoreUnavailable as error:
            log.warning("a rollout could not be reported: %s", error.message)
