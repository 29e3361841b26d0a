"""The experiments that split traffic in this server now, and the loop that judges them.

A change of an experiment is followed within `POLL_SECONDS`. The arms of a new one are loaded and
checked first, as a promote is; one that cannot be served pauses it, and production goes on. So
does production that is moved by somebody else: the control would be no control any more.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from registry.adapter import PRODUCTION, AdapterName
from registry.base import BaseModel
from registry.errors import BaseMismatch, Conflict, StoreUnavailable, WardrobeError
from registry.records import Alias
from registry.store import Registry
from serving.experiments.arms import MakeReady, ready_route
from serving.experiments.decide import Verdict, decide
from serving.experiments.experiment import Arm, Experiment, State
from serving.experiments.ramps import describe_step, next_step
from serving.experiments.store import Experiments
from serving.latest import Latest
from serving.routing import Route

POLL_SECONDS = 0.25
JUDGE_SECONDS = 1.0
JUDGE_REST = 20  # times what a judgement took: never more than a twentieth of the time
START_SECONDS = 10.0  # that a server waits at its start for the arms of what runs
TAKE_UP_SECONDS = 120.0  # arms that are not ready by then cannot be served
ACTOR = "wardrobe"  # who decides when nobody does

log = logging.getLogger("wardrobe.experiments")


@dataclass(frozen=True, slots=True)
class Running:
    """An experiment whose arms are ready, as one request sees it."""

    experiment: Experiment
    routes: tuple[Route, ...]  # one for each arm


class NotPromoted(WardrobeError):
    """A winner that the registry did not take."""

    code = "not_promoted"


class LiveExperiments:
    """Follows the store of experiments, from `start` to `stop`."""

    def __init__(
        self,
        store: Experiments,
        registry: Registry,
        base: BaseModel,
        make_ready: MakeReady,
    ) -> None:
        self._store = store
        self._found = Latest(store, partial(store.find, ["running"]))
        self._registry = registry
        self._base = base
        self._make_ready = make_ready
        # By the adapter and the experiment's id; only those of a layer are several on one adapter.
        self._running: defaultdict[AdapterName, dict[str, Running]] = defaultdict(dict)
        self._taking: dict[str, asyncio.Task[None]] = {}  # experiment id → its arms being loaded
        self._loops: list[asyncio.Task[None]] = []

    def of(self, name: AdapterName, key: str) -> Running | None:
        """Return the experiment on an adapter that may have the unit called `key`."""
        on_it = self._running.get(name, {}).values()
        return next((running for running in on_it if running.experiment.may_have(key)), None)

    async def start(self) -> None:
        """Take up what runs before the first request comes: whoever has an arm is to keep it."""
        await self._survive(self._follow)
        if self._taking:
            await asyncio.wait(list(self._taking.values()), timeout=START_SECONDS)
        self._loops = [
            asyncio.create_task(self._repeat(self._follow, POLL_SECONDS)),
            asyncio.create_task(self._repeat(self._judge, JUDGE_SECONDS, rest=JUDGE_REST)),
        ]

    async def stop(self) -> None:
        tasks = [*self._loops, *self._taking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _repeat(
        self, step: Callable[[], Awaitable[None]], seconds: float, rest: float = 0
    ) -> None:
        while True:
            started = time.monotonic()
            await self._survive(step)
            await asyncio.sleep(max(seconds, rest * (time.monotonic() - started)))

    async def _survive(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step that is tried again later, so that no failure ends what comes after it."""
        try:
            await step()
        except StoreUnavailable as error:
            log.warning("experiments cannot be read, known ones go on: %s", error.message)
        except Exception:
            log.exception("a step of the experiments failed, trying again")

    async def _follow(self) -> None:
        found = await self._found.get()
        here = {experiment.id for experiment in found}
        for known in self._running.values():
            for experiment_id in known.keys() - here:
                del known[experiment_id]
        for experiment_id, task in self._taking.items():
            if experiment_id not in here:
                task.cancel()
        for experiment in found:
            known = self._running[experiment.name].get(experiment.id)
            if known is None and experiment.id not in self._taking:
                self._begin(experiment)
            elif known is not None and known.experiment != experiment:  # a ramp: the same arms
                self._put(replace(known, experiment=experiment))

    def _begin(self, experiment: Experiment) -> None:
        """Load the arms on the side: a slow one must not keep others from being stopped."""
        step = partial(self._take_up, experiment)
        task = asyncio.create_task(self._survive(step))
        self._taking[experiment.id] = task
        task.add_done_callback(lambda _: self._taking.pop(experiment.id))

    async def _take_up(self, experiment: Experiment) -> None:
        try:
            async with asyncio.timeout(TAKE_UP_SECONDS):
                routes = [await self._route(arm) for arm in experiment.arms]
        except BaseMismatch:
            return  # for the servers of that base
        except StoreUnavailable:
            raise  # says nothing about the arms
        except TimeoutError:
            sentence = f"The arms are not ready after {TAKE_UP_SECONDS:.0f} seconds."
            await self._move(experiment, "paused", "pause", sentence)
        except WardrobeError as error:
            sentence = f"An arm cannot be served: {error.message}"
            await self._move(experiment, "paused", "pause", sentence)
        else:
            if await asyncio.to_thread(self._store.get, experiment.id) != experiment:
                return  # it was stopped or ramped meanwhile: the next look takes it as it is
            self._put(Running(experiment, tuple(routes)))
            log.info("experiment=%s splits name=%s", experiment.id, experiment.name)

    def _put(self, running: Running) -> None:
        self._running[running.experiment.name][running.experiment.id] = running

    async def _route(self, arm: Arm) -> Route:
        return await ready_route(arm, self._registry, self._base, self._make_ready)

    async def _judge(self) -> None:
        for running in [r for known in self._running.values() for r in known.values()]:
            await self._survive(partial(self._judge_one, running.experiment))

    async def _judge_one(self, experiment: Experiment) -> None:
        counts = await asyncio.to_thread(self._store.counts, experiment)
        verdict = decide(experiment, counts)
        if verdict.action == "pause":
            await self._move(experiment, "paused", "pause", verdict.sentence, verdict)
        elif verdict.action in ("stop harmed", "loss", "futile"):
            await self._move(experiment, "stopped", verdict.action, verdict.sentence, verdict)
        elif verdict.action == "win" and experiment.policy.on_win == "promote":
            assert verdict.winner is not None, "a win has its arm"
            await self._promote(experiment, experiment.arms[verdict.winner], verdict)
        elif moved := await asyncio.to_thread(self._moved, experiment):
            await self._move(experiment, "paused", "pause", moved, verdict)
        else:
            await self._ramp(experiment, verdict)

    async def _ramp(self, experiment: Experiment, verdict: Verdict) -> None:
        """Raise the exposure when the ramp's next stage is due and nothing speaks against it."""
        units = sum(verdict.units)
        if (step := next_step(experiment, units)) is None:
            return
        reason = f"The ramp's next stage, {describe_step(step)}, with {units} units so far."
        exposure = step.exposure
        await self._move(experiment, "running", "ramp", reason, verdict, exposure=exposure)

    def _moved(self, experiment: Experiment, *allowed: Arm) -> str:
        """Say why the control is no control any more; empty while production is an allowed arm."""
        now, control = self._production(experiment.name), experiment.arms[0]
        if now.digest in (arm.digest for arm in (control, *allowed)):
            return ""
        return (
            f"{experiment.name} is v{now.number} in production now, and the control is "
            f"v{control.number}. Make another experiment for what production is now."
        )

    def _production(self, name: AdapterName) -> Alias:
        return next(a for a in self._registry.aliases(name) if a.alias == PRODUCTION)

    async def _promote(self, experiment: Experiment, arm: Arm, verdict: Verdict) -> None:
        """Promote while the move to `stopped` is being written.

        So nobody's stop or pause is overtaken. After a crash in between, both are done again and
        the promote changes nothing.
        """
        assert arm.number is not None, "a design that promotes has versions of the adapter as arms"
        number, reason = arm.number, f"{experiment.id}: {verdict.sentence}"[:2000]

        def promote() -> None:
            generation = self._production(experiment.name).generation
            if moved := self._moved(experiment, arm):
                raise NotPromoted(moved)
            try:
                self._registry.promote(
                    experiment.name,
                    number,
                    reason=reason,
                    actor=ACTOR,
                    expected_generation=generation,
                )
            except Conflict as error:  # its gate forbids it: a person has to say so
                raise NotPromoted(error.message) from error

        try:
            await self._move(experiment, "stopped", "win", verdict.sentence, verdict, promote)
        except NotPromoted as error:
            sentence = f"{verdict.sentence} Not promoted: {error.message}"
            await self._move(experiment, "paused", "pause", sentence, verdict)

    async def _move(
        self,
        experiment: Experiment,
        state: State,
        action: str,
        reason: str,
        verdict: Verdict | None = None,
        also: Callable[[], None] | None = None,
        exposure: float | None = None,
    ) -> None:
        move = partial(
            self._store.move,
            experiment,
            state,
            exposure=exposure,
            action=action,
            actor=ACTOR,
            reason=reason,
            numbers=verdict.plain() if verdict else None,
            also=also,
        )
        log.warning("experiment=%s %s: %s", experiment.id, action, reason)
        try:
            await asyncio.to_thread(move)
        except Conflict:
            return  # another server, or a person, was first; the next look shows what they did
        if state != "running":
            self._running[experiment.name].pop(experiment.id, None)
