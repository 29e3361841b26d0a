"""The shadows that run in this server now, and what they have found.

A shadow is taken up within `POLL_SECONDS`; its candidate is loaded and checked first, and one that
cannot be served ends it. Pairs are written in batches, on one thread at a time, so that a locked
database can hold up nothing but the pairs.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from registry.adapter import AdapterName
from registry.base import BaseModel
from registry.errors import BaseMismatch, StoreUnavailable, WardrobeError
from registry.store import Registry
from serving.experiments.arms import MakeReady, ready_route
from serving.experiments.experiment import unit_of
from serving.latest import Latest
from serving.routing import Route
from serving.shadow.comparison import Comparison
from serving.shadow.pair import Pair
from serving.shadow.store import Comparisons

POLL_SECONDS = 0.5
TAKE_UP_SECONDS = 120.0
MAX_PENDING = 2000  # pairs that wait to be written
MAX_PAIRS = 100_000  # of one shadow; then it has found out what there is to find

log = logging.getLogger("wardrobe.shadow")


@dataclass(frozen=True, slots=True)
class Live:
    """A shadow whose candidate is ready."""

    comparison: Comparison
    route: Route  # the candidate's


@dataclass(frozen=True, slots=True)
class Chosen:
    """A request that is to be mirrored."""

    live: Live
    unit: str


class LiveShadows:
    """Follows the store of shadows, from `start` to `stop`. `counted` hears what became of each."""

    def __init__(
        self,
        store: Comparisons,
        registry: Registry,
        base: BaseModel,
        make_ready: MakeReady,
        counted: Callable[[str], None],
    ) -> None:
        self._store = store
        self._found = Latest(store, partial(store.find, running=True))
        self._registry = registry
        self._base = base
        self._make_ready = make_ready
        self._counted = counted
        self._live: dict[AdapterName, Live] = {}
        self._taking: dict[str, asyncio.Task[None]] = {}  # id → its candidate being loaded
        self._pairs: list[Pair] = []
        self._missed: Counter[tuple[str, str]] = Counter()
        self._sizes: Counter[str] = Counter()  # id → pairs written
        self._ending = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def choose(self, name: AdapterName, fingerprint: str, whose: str) -> Chosen | None:
        """Return how production's answer to a unit is mirrored, or None.

        `fingerprint` is of the version that answers, `whose` names the unit among all tenants'.
        """
        live = self._live.get(name)
        if live is None:
            return None
        unit = unit_of(live.comparison.salt, whose)
        if not live.comparison.chooses(unit):
            return None
        if fingerprint != live.comparison.production.digest:
            self.miss(live.comparison, "other")
            return None
        return Chosen(live, unit)

    def take(self, pair: Pair) -> None:
        """Take a pair; it is written soon."""
        if len(self._pairs) >= MAX_PENDING:
            self._missed[pair.comparison, "lost"] += 1
            self._counted("lost")
        else:
            self._pairs.append(pair)
            self._counted("failed" if pair.failed else "pair")

    def miss(self, comparison: Comparison, why: str) -> None:
        """Note that a chosen request makes no pair."""
        self._missed[comparison.id, why] += 1
        self._counted(why)

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is left, once. The mirror has been stopped before."""
        self._ending.set()
        if self._loop is not None:
            await self._loop  # cancelled, it would leave a write that goes on and is done again
        tasks = list(self._taking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._survive(self._flush)

    async def _run(self) -> None:
        while not self._ending.is_set():
            await self._survive(self._follow)
            await self._survive(self._flush)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._ending.wait()

    async def _survive(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except StoreUnavailable as error:
            log.warning("shadows cannot be read or written, trying again: %s", error.message)
        except Exception:
            log.exception("a step of the shadows failed, trying again")

    async def _follow(self) -> None:
        found = {comparison.id: comparison for comparison in await self._found.get()}
        for name, live in list(self._live.items()):
            if live.comparison.id not in found:
                del self._live[name]
        for comparison_id, task in self._taking.items():
            if comparison_id not in found:
                task.cancel()
        known = {live.comparison.id for live in self._live.values()} | self._taking.keys()
        for comparison in found.values():
            if comparison.id not in known:
                task = asyncio.create_task(self._survive(partial(self._take_up, comparison)))
                self._taking[comparison.id] = task
                task.add_done_callback(partial(self._taken, comparison.id))

    def _taken(self, comparison_id: str, _: "asyncio.Task[None]") -> None:
        del self._taking[comparison_id]

    async def _take_up(self, comparison: Comparison) -> None:
        try:
            async with asyncio.timeout(TAKE_UP_SECONDS):
                route = await ready_route(
                    comparison.candidate, self._registry, self._base, self._make_ready
                )
        except BaseMismatch:
            return  # for the servers of that base
        except StoreUnavailable:
            raise  # says nothing about the candidate
        except TimeoutError:
            await self._end(comparison, f"not ready after {TAKE_UP_SECONDS:.0f} seconds")
        except WardrobeError as error:
            await self._end(comparison, f"The candidate cannot be served: {error.message}")
        else:
            self._sizes[comparison.id] = await asyncio.to_thread(self._store.size, comparison)
            self._live[comparison.name] = Live(comparison, route)
            log.info("shadow=%s mirrors name=%s", comparison.id, comparison.name)

    async def _flush(self) -> None:
        """Write what there is. What cannot be written waits for the next time."""
        pairs, missed = list(self._pairs), Counter(self._missed)
        if not pairs and not missed:
            return
        await asyncio.to_thread(self._store.record, pairs, missed)
        del self._pairs[: len(pairs)]
        self._missed -= missed  # keeps what is above 0: what came meanwhile
        self._sizes.update(pair.comparison for pair in pairs)
        for live in list(self._live.values()):
            if self._sizes[live.comparison.id] >= MAX_PAIRS:
                await self._end(live.comparison, f"It has {MAX_PAIRS:,} pairs.")

    async def _end(self, comparison: Comparison, reason: str) -> None:
        log.warning("shadow=%s ends: %s", comparison.id, reason)
        await asyncio.to_thread(self._store.stop, comparison, reason)
