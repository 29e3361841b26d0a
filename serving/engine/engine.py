"""The torch engine's asynchronous face. One thread owns torch; callers talk to it by messages."""

import asyncio
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from itertools import filterfalse

import torch

from registry.adapter import AdapterRef
from registry.base import BaseModel
from serving.engine.boundary import (
    AdapterFiles,
    EngineBusy,
    EngineError,
    EngineStats,
    EngineUnavailable,
    GenerateRequest,
    Priority,
    RequestRefused,
    TokenDelta,
)
from serving.engine.budgets import within_memory
from serving.engine.build import Parts, assemble, read_model
from serving.engine.core import Event, Ticket, Warm
from serving.engine.hardware import elsewhere
from serving.engine.loader import Fetch
from serving.engine.sequence import Sequence
from serving.engine.settings import EngineSettings
from serving.engine.stream import Item, Stream, hand_over

logger = logging.getLogger(__name__)

MAX_RETRY_SECONDS = 60
LOADING_SECONDS = 0.035  # that a step waits for an adapter which is read meanwhile
TELLING_SECONDS = 0.034  # from the beginning of a step until what it gave is told, beside a load
QUIET_SECONDS = 0.1  # without anything to do, before memory is made ready and put in order
TIDYING_SHARE = 0.2  # of the time of steps that memory is put in order in, while they run
WRITING_TURNS = 2  # of the event loop, until whoever was given a token has written it
ANSWERING_TURNS = 8  # from the end of a self-check until its load call is answered
ASKING_SECONDS = 0.005  # from the answer to a load call to the request for what it has loaded


class TorchEngine:
    """Engine in this process; see `serving.engine.boundary.Engine` for the contract."""

    def __init__(self, parts: Parts, settings: EngineSettings) -> None:
        self._parts, self._settings = parts, settings
        self._core = parts.core
        self._changed = threading.Condition()
        # `_changed` guards what callers and the step thread both write: the inbox, the streams and
        # the flags. `_death`, `_stats` and `_heard` only the step thread writes; the core is its
        # own.
        self._inbox: deque[tuple[Callable[[Ticket], None], Ticket]] = deque()
        self._streams: dict[Ticket, Stream] = {}
        self._taken: Counter[tuple[str, Priority]] = Counter()  # of them, requests of each class
        self._loaded = False  # a load ended since the last step
        self._heard = False  # a message was taken in since the last step
        self._held_until = 0.0  # the next step waits for a load so long
        self._tidy_from = 0.0  # no memory is put in order between steps before
        self._closing = False
        self._death: str | None = None
        self._seconds = 1.0  # of a request, smoothed
        self._stats = parts.stats
        self._core.residency.loader.on_done = self._wake
        self._thread = threading.Thread(target=self._work, name="engine-step", daemon=True)
        self._thread.start()

    @classmethod
    def create(
        cls,
        base: BaseModel,
        fetch: Fetch,
        settings: EngineSettings | None = None,
    ) -> "TorchEngine":
        """Read the base and start. `fetch` gives the files of an adapter; it may block.

        Raises EngineUnavailable when this engine cannot run the base, with the reason.
        """
        settings = within_memory(base, settings or EngineSettings())
        parts = elsewhere(lambda: assemble(read_model(base, settings), fetch, settings))
        logger.info("computing with %s in %s", parts.stats.operators, parts.stats.dtype)
        return cls(parts, settings)

    @property
    def max_model_len(self) -> int:
        return self._parts.max_model_len

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        self._check(request)
        grammar = request.sampling.grammar
        constraint = None if grammar is None else await self._parts.grammars.start(grammar)
        stream = self._submit(Sequence(request, constraint))
        try:
            while True:
                item = await stream.items.get()
                if isinstance(item, EngineError):
                    raise item
                assert item is not None
                yield item
                if item.finish_reason:
                    return
        finally:
            self._forget(stream)

    async def warm(self, adapter: AdapterRef) -> None:
        await self._wish(Warm(adapter))

    async def keep(self, adapter: AdapterRef) -> None:
        await self._wish(Warm(adapter, keep=True))

    def prefetch(self, adapter: AdapterRef, files: AdapterFiles) -> None:
        with self._changed:
            if not (self._death or self._closing):
                self._core.residency.begin(adapter, len(self._inbox), files)

    async def release(self, adapter: AdapterRef) -> None:
        with self._changed:
            self._inbox.append((self._core.release, Warm(adapter)))
            self._changed.notify()

    async def _wish(self, wish: Warm) -> None:
        stream = self._submit(wish)
        try:
            if item := await stream.items.get():
                assert isinstance(item, EngineError)
                raise item
        finally:
            self._forget(stream)

    def check_room(self, tenant: str, priority: Priority = "normal") -> None:
        taken = self._taken[tenant, priority]  # a full class takes nobody else's room
        limit = self._settings.max_running + self._settings.max_waiting
        if taken >= limit:
            raise EngineBusy(
                f"{taken} requests are running or waiting, the limit is {limit}.",
                self._retry_after(),
            )

    async def stats(self) -> EngineStats:
        return self._stats

    async def check_health(self) -> None:
        if self._death or self._closing:
            raise EngineUnavailable(self._death or "The engine is closed.")

    async def aclose(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._core.residency.loader.close)
        await asyncio.to_thread(self._parts.grammars.close)

    def _check(self, request: GenerateRequest) -> None:
        """Raise RequestRefused for what can never run here."""
        prompt, wanted = len(request.prompt_ids), request.sampling.max_tokens
        if not prompt:
            raise RequestRefused("The prompt is empty: send at least one token.")
        if prompt + wanted > self.max_model_len:
            raise RequestRefused(
                f"The prompt has {prompt} tokens and max_tokens is {wanted}: together "
                f"{prompt + wanted}, this model takes {self.max_model_len}."
            )
        vocab = self._parts.vocab
        ids = (*request.prompt_ids, *(token_id for token_id, _ in request.sampling.logit_bias))
        if strange := next((i for i in ids if not 0 <= i < vocab), None):
            raise RequestRefused(f"Token id {strange} is not in the vocabulary of {vocab}.")

    def _submit(self, ticket: Ticket) -> Stream:
        with self._changed:
            if self._death or self._closing:
                raise EngineUnavailable(self._death or "The engine is closed.")
            if isinstance(ticket, Sequence):
                self.check_room(ticket.request.tenant, ticket.request.priority)
                self._taken[_class_of(ticket.request)] += 1
            stream = self._streams[ticket] = Stream(ticket)
            self._inbox.append((self._adding(ticket), ticket))
            self._changed.notify()
            return stream

    def _adding(self, ticket: Ticket) -> Callable[[Ticket], None]:
        """Return what hands the ticket over; its adapter loads while it waits for the step."""
        if ticket.adapter is None:
            return self._core.add
        load = self._core.residency.begin(ticket.adapter, len(self._inbox))
        return partial(self._core.add, load=load)

    def _retry_after(self) -> int:
        """Estimate the seconds until a place is free: a request's time over those that run."""
        return min(MAX_RETRY_SECONDS, math.ceil(self._seconds / self._settings.max_running) or 1)

    def _forget(self, stream: Stream) -> None:
        """Abort unless it has ended. The caller may be cancelled: this never waits."""
        with self._changed:
            if stream.ticket in self._streams:
                self._end(stream.ticket)
                self._inbox.append((self._core.abort, stream.ticket))
                self._changed.notify()

    def _end(self, ticket: Ticket) -> None:
        """Let nobody wait for a ticket any more. Under `_changed`."""
        del self._streams[ticket]
        if isinstance(ticket, Sequence):
            whose = _class_of(ticket.request)
            self._taken[whose] -= 1
            if not self._taken[whose]:
                del self._taken[whose]

    def _wake(self) -> None:
        with self._changed:
            self._loaded, self._held_until = True, 0.0
            self._changed.notify()

    def _work(self) -> None:
        """The step thread. Whatever ends it ends every request with EngineUnavailable."""
        if self._settings.threads is not None:
            torch.set_num_threads(self._settings.threads)
        reason = "The engine was closed while the request ran."
        try:
            with torch.inference_mode():
                while self._await_work():
                    self._hear()
                    self._await_load()
                    began = time.monotonic()
                    events = self._core.step()
                    self._heard = False
                    self._stats = self._core.stats(self._parts.stats)
                    self._hear()
                    self._await_load(began + TELLING_SECONDS)
                    self._tell(events)
        except BaseException as error:  # a dead thread must say so: see check_health
            logger.exception("the step thread died")
            reason = f"The engine died: {error!r}. Restart the server."
            self._death = reason
        with self._changed:
            self._closing = True
            tickets = list(self._streams)
        self._deliver([(ticket, EngineUnavailable(reason)) for ticket in tickets], WRITING_TURNS)

    def _await_work(self) -> bool:
        """Wait until there is something to do; after a while of nothing, do the chores.

        False: close.
        """
        loader = self._core.residency.loader
        while True:
            with self._changed:
                quiet = QUIET_SECONDS if self._core.chores() or loader.waits else None
                if self._changed.wait_for(self._is_due, quiet):
                    self._loaded = False
                    return not self._closing
            loader.advance()
            while (chores := self._core.chores()) and not self._is_due():
                chores[0].work()

    def _is_due(self) -> bool:
        told = self._inbox or self._loaded or self._closing
        return bool(told or self._heard or self._core.has_work)

    def _hear(self) -> None:
        """Take the messages in, and see whether the next step should wait for a load.

        It waits a moment for an adapter that somebody wants kept: beside a step its load takes
        longer and the step, too, and then it waits for the end of it. For those that run this is
        about as long as a step with a part of its first prompt, or shorter.
        """
        with self._changed:
            messages, self._inbox = self._inbox, deque()
        for handle, ticket in messages:
            handle(ticket)
            self._heard = True
        with self._changed:  # a load that ends from now on ends the wait
            if self._stats.device == "cpu" and self._core.holds():
                self._held_until = time.monotonic() + LOADING_SECONDS

    def _await_load(self, latest: float = math.inf) -> None:
        """Wait for the load, until `latest` at most.

        Part of the wait is before the tokens of the last step are told, the rest behind it: in two
        gaps of the streams, each about as long as that of a prompt's part.
        """
        with self._changed:
            seconds = min(self._held_until, latest) - time.monotonic()
            if seconds > 0:
                self._changed.wait_for(lambda: not self._held_until or self._closing, seconds)

    def _tell(self, events: list[Event]) -> None:
        """Deliver what a step gave, and wait a moment for who was told that an adapter is kept.

        It asks for the adapter at once. Without the wait its request would come just after a step
        has begun, and wait for all of it. The others get their tokens after the wait, which so
        makes the short gap of a self-check longer, not the next one, with a part of a prompt.
        """
        if self._stats.device == "cpu" and any(map(_is_kept, events)):
            self._deliver(filter(_ends, events), ANSWERING_TURNS)
            with self._changed:
                self._changed.wait_for(lambda: self._inbox or self._closing, ASKING_SECONDS)
            events = list(filterfalse(_ends, events))
        self._deliver(events, WRITING_TURNS, self._tidy)

    def _tidy(self) -> None:
        """What the step thread does while tokens are written; who has come since waits for none."""
        self._core.store_read()
        began = time.monotonic()
        calm = not self._inbox and began >= self._tidy_from
        if calm and (chore := self._core.pressing()):
            chore.work()
            ended = time.monotonic()
            self._tidy_from = ended + (ended - began) / TIDYING_SHARE

    def _deliver(
        self, events: Iterable[Event], turns: int, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Hand the events to their callers; on a CPU, give these so many turns to write them."""
        items: list[tuple[Stream, Item]] = []
        with self._changed:
            for ticket, item in events:
                stream = self._streams.get(ticket)
                if stream is None:
                    continue  # aborted while the step ran; its message is in the inbox
                if _ends((ticket, item)):
                    self._end(ticket)
                    if isinstance(item, TokenDelta):
                        self._smooth(time.monotonic() - stream.started)
                items.append((stream, item))
        turns = turns if self._stats.device == "cpu" else 0
        for stream in hand_over(items, turns=turns, meanwhile=meanwhile):
            self._forget(stream)  # nobody is left to read

    def _smooth(self, seconds: float) -> None:
        self._seconds += 0.1 * (seconds - self._seconds)


def _is_kept(event: Event) -> bool:
    """Tell whether an adapter is in a slot from now on because somebody wants it kept."""
    ticket, item = event
    return isinstance(ticket, Warm) and ticket.keep and item is None


def _ends(event: Event) -> bool:
    """Tell whether nothing more comes for a ticket."""
    _, item = event
    return not isinstance(item, TokenDelta) or item.finish_reason is not None


def _class_of(request: GenerateRequest) -> tuple[str, Priority]:
    """Return whose room a request takes."""
    return request.tenant, request.priority
