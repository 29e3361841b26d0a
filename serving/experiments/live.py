"""The experiments that split traffic in this server now, and the loop that judges them.

A new or changed experiment is taken up within `POLL_SECONDS`: its arms are loaded and checked
first, as a promote is; one that cannot be served pauses the experiment, and production goes on.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from registry.adapter import PRODUCTION, AdapterName, Selector, Version
from registry.base import BaseModel
from registry.errors import BaseMismatch, Conflict, IntegrityError, StoreUnavailable, WardrobeError
from registry.store import Registry
from serving.experiments.decide import Verdict, decide
from serving.experiments.experiment import Arm, Experiment
from serving.experiments.store import Experiments
from serving.routing import Route

POLL_SECONDS = 0.25
JUDGE_SECONDS = 1.0  # and never more than a twentieth of the time is spent on it
ACTOR = "wardrobe"  # who decides when nobody does

log = logging.getLogger("wardrobe.experiments")


@dataclass(frozen=True, slots=True)
class Running:
    """An experiment whose arms are ready, as one request sees it."""

    experiment: Experiment
    routes: tuple[Route, ...]  # one for each arm


class LiveExperiments:
    """Follows the store of experiments, from `start` to `stop`."""

    def __init__(
        self,
        store: Experiments,
        registry: Registry,
        base: BaseModel,
        make_ready: Callable[[Version], Awaitable[None]],
    ) -> None:
        self._store = store
        self._registry = registry
        self._base = base
        self._make_ready = make_ready
        self._running: dict[AdapterName, Running] = {}
        self._loops: list[asyncio.Task[None]] = []

    def of(self, name: AdapterName) -> Running | None:
        """Return the experiment that splits the production traffic of an adapter."""
        return self._running.get(name)

    async def start(self) -> None:
        self._loops = [
            asyncio.create_task(self._repeat(self._follow, POLL_SECONDS)),
            asyncio.create_task(self._repeat(self._judge, JUDGE_SECONDS)),
        ]

    async def stop(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def _repeat(self, step: Callable[[], Awaitable[None]], seconds: float) -> None:
        while True:
            started = time.monotonic()
            try:
                await step()
            except StoreUnavailable as error:
                log.warning("experiments cannot be read, known ones go on: %s", error.message)
            except Exception:
                log.exception("following the experiments failed, trying again")
            await asyncio.sleep(max(seconds, 20 * (time.monotonic() - started)))

    async def _follow(self) -> None:
        found = await asyncio.to_thread(self._store.find, ["running"])
        here = {experiment.name: experiment for experiment in found}
        for name in self._running.keys() - here.keys():
            del self._running[name]
        for name, experiment in here.items():
            known = self._running.get(name)
            if known is None or known.experiment.id != experiment.id:
                self._running.pop(name, None)
                await self._take_up(experiment)
            elif known.experiment != experiment:  # a ramp: the arms are the same
                self._running[name] = replace(known, experiment=experiment)

    async def _take_up(self, experiment: Experiment) -> None:
        try:
            routes = [await self._route(arm) for arm in experiment.arms]
        except BaseMismatch:
            return  # for the servers of that base
        except WardrobeError as error:
            reason = f"An arm cannot be served: {error.message}"
            await self._move(experiment, "paused", "pause", reason, None)
            return
        self._running[experiment.name] = Running(experiment, tuple(routes))
        log.info("experiment=%s splits name=%s", experiment.id, experiment.name)

    async def _route(self, arm: Arm) -> Route:
        if arm.name is None or arm.number is None:
            if arm.digest != self._base.fingerprint:
                raise BaseMismatch(f"The arm {arm.label} is another base model.")
            return Route(self._base.id, self._base.fingerprint)
        selector = Selector(arm.name, number=arm.number)
        version = await asyncio.to_thread(self._registry.resolve, selector)
        if version.digest != arm.digest:
            raise IntegrityError(f"{version.ref.label} is not what it was: {version.digest}.")
        if version.base_id != self._base.id:
            raise BaseMismatch(f"{version.ref.label} is for {version.base_id}.")
        await self._make_ready(version)
        return Route.to(version)

    async def _judge(self) -> None:
        for running in list(self._running.values()):
            counts = await asyncio.to_thread(self._store.counts, running.experiment)
            await self._act(running.experiment, decide(running.experiment, counts))

    async def _act(self, experiment: Experiment, verdict: Verdict) -> None:
        if verdict.action == "pause":
            await self._move(experiment, "paused", "pause", verdict.sentence, verdict)
        elif verdict.action in ("stop harmed", "loss"):
            await self._move(experiment, "stopped", verdict.action, verdict.sentence, verdict)
        elif verdict.action == "win" and experiment.on_win == "promote":
            assert verdict.winner is not None, "a win has its arm"
            await self._promote(experiment, experiment.arms[verdict.winner], verdict)

    async def _promote(self, experiment: Experiment, arm: Arm, verdict: Verdict) -> None:
        """Promote first: after a crash in between, both are done again and change nothing."""
        assert arm.number is not None, "a design that promotes has versions of the adapter as arms"
        reason = f"{experiment.id}: {verdict.sentence}"[:2000]
        try:
            await asyncio.to_thread(
                self._registry.promote,
                experiment.name,
                arm.number,
                alias=PRODUCTION,
                reason=reason,
                actor=ACTOR,
            )
        except Conflict as error:  # its gate forbids it: a person has to say so
            sentence = f"{verdict.sentence} Not promoted: {error.message}"
            await self._move(experiment, "paused", "pause", sentence, verdict)
            return
        await self._move(experiment, "stopped", "win", verdict.sentence, verdict)

    async def _move(
        self,
        experiment: Experiment,
        state: str,
        action: str,
        reason: str,
        verdict: Verdict | None,
    ) -> None:
        def move() -> None:
            self._store.move(
                experiment,
                "paused" if state == "paused" else "stopped",
                action=action,
                actor=ACTOR,
                reason=reason,
                numbers=verdict.plain() if verdict else None,
            )

        log.warning("experiment=%s %s: %s", experiment.id, action, reason)
        try:
            await asyncio.to_thread(move)
        except Conflict:
            return  # another server, or a person, was first; the next look shows what they did
        self._running.pop(experiment.name, None)
