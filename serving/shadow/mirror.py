"""Lets a candidate answer what production answers, for nobody.

The candidate's request is one more row of the same batch, of low priority: it takes what the
others leave. Nothing here can fail, delay or charge production's request: it only looks on.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from registry.errors import WardrobeError
from serving.api.sequence import Piece, sequence
from serving.engine.boundary import (
    Engine,
    EngineBusy,
    EngineUnavailable,
    GenerateRequest,
    TokenLogprob,
)
from serving.routing import Route
from serving.shadow.live import Chosen, LiveShadows
from serving.shadow.pair import Pair, Side, compare
from serving.tokens import Tokens

MAX_IN_FLIGHT = 8  # of one server; what comes beyond is dropped and counted
MIRROR_SECONDS = 120.0  # a candidate that is not done by then is given up
TOP_LOGPROBS = 5  # among which production's token is looked for where the answers differ

PromptFor = Callable[[Route], Awaitable[Sequence[int] | None]]  # None: it has no place there

log = logging.getLogger("wardrobe.shadow")


@dataclass(slots=True)
class Watch:
    """Production's answer, as it passes by. Of several choices the first."""

    started: float = field(default_factory=time.monotonic)
    token_ids: list[int] = field(default_factory=list[int])
    text: list[str] = field(default_factory=list[str])
    side: "asyncio.Future[Side]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def see(self, piece: Piece) -> None:
        if piece.index:
            return
        self.token_ids += piece.token_ids
        self.text.append(piece.text)
        if piece.finish_reason and not self.side.done():
            self.side.set_result(self._side(piece))

    def _side(self, piece: Piece) -> Side:
        seconds = time.monotonic() - self.started
        stopped = piece.finish_reason == "stop"
        return Side(tuple(self.token_ids), "".join(self.text), stopped, seconds)


class Mirror:
    """The candidates' answers that are being made. Belongs to one event loop."""

    def __init__(self, shadows: LiveShadows, engine: Engine, tokens: Tokens) -> None:
        self._shadows = shadows
        self._engine = engine
        self._tokens = tokens
        self._running: set[asyncio.Task[None]] = set()

    async def begin(
        self,
        chosen: Chosen,
        request: GenerateRequest,
        stops: Sequence[str],
        prompt_for: PromptFor,
        *,
        json_asked: bool,
    ) -> "tuple[Watch, asyncio.Task[None]] | None":
        """Start the candidate beside production's request; None when there is no room for it.

        The caller shows the watch every piece of the answer, and cancels the task when the answer
        does not come to its end.
        """
        stats = await self._engine.stats()
        if len(self._running) >= MAX_IN_FLIGHT or stats.waiting:
            self._shadows.miss(chosen.live.comparison, "busy")
            return None
        watch = Watch()
        job = _Job(chosen, request, stops, prompt_for, watch, json_asked)
        task = asyncio.create_task(self._run(job))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return watch, task

    async def stop(self) -> None:
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: "_Job") -> None:
        comparison = job.chosen.live.comparison
        try:
            pair = await self._pair(job)
        except asyncio.CancelledError:
            self._shadows.miss(comparison, "unfinished")
            raise
        except EngineBusy:
            self._shadows.miss(comparison, "busy")
        except EngineUnavailable:
            self._shadows.miss(comparison, "unfinished")
        except TimeoutError:
            self._shadows.miss(comparison, "late")
        except Exception:
            log.exception("mirroring %s failed", job.request.request_id)
            self._shadows.miss(comparison, "lost")
        else:
            if pair is None:
                self._shadows.miss(comparison, "raw")
            else:
                self._shadows.take(pair)

    async def _pair(self, job: "_Job") -> Pair | None:
        """Return the pair; None where the candidate's prompt has no place in the request."""
        comparison, unit = job.chosen.live.comparison, job.chosen.unit
        key = job.request.request_id
        async with asyncio.timeout(MIRROR_SECONDS):
            prompt = await job.prompt_for(job.chosen.live.route)
            if prompt is None:
                return None
            try:
                candidate = await self._answer(job, prompt)
            except (EngineBusy, EngineUnavailable):
                raise  # says nothing about the candidate
            except WardrobeError as error:
                log.warning("shadow=%s candidate failed on %s: %s", comparison.id, key, error)
                candidate = None
            production = await job.watch.side
        if candidate is None:
            return Pair(comparison.id, key, unit, failed=True)
        return compare(comparison.id, key, unit, production, candidate, json_asked=job.json_asked)

    async def _answer(self, job: "_Job", prompt: Sequence[int]) -> Side:
        request, started = _low(job, prompt), time.monotonic()
        token_ids: list[int] = []
        text: list[str] = []
        logprobs: list[TokenLogprob] = []
        stopped = False
        pieces = sequence(self._engine, self._tokens, request, job.stops, 0)
        async with aclosing(pieces):
            async for piece in pieces:
                token_ids += piece.token_ids
                text.append(piece.text)
                logprobs += (placed.token for placed in piece.logprobs)
                stopped = piece.finish_reason == "stop"
        seconds = time.monotonic() - started
        return Side(tuple(token_ids), "".join(text), stopped, seconds, logprobs)


@dataclass(frozen=True, slots=True)
class _Job:
    chosen: Chosen
    request: GenerateRequest  # production's
    stops: Sequence[str]
    prompt_for: PromptFor
    watch: Watch
    json_asked: bool


def _low(job: _Job, prompt: Sequence[int]) -> GenerateRequest:
    """Return the candidate's request: production's with another version, behind all others."""
    request = job.request
    logprobs = max(TOP_LOGPROBS, request.sampling.logprobs or 0)
    return replace(
        request,
        request_id=f"shadow-{request.request_id}",
        prompt_ids=tuple(prompt),
        sampling=replace(request.sampling, logprobs=logprobs),
        adapter=job.chosen.live.route.adapter,
        priority="low",
    )
