"""The step loop's body: schedule → run → sample → publish. One thread, no locks, no asyncio."""

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from registry.adapter import AdapterRef
from serving.engine.boundary import (
    AdapterLoadFailed,
    EngineError,
    EngineStats,
    FinishReason,
    RequestFailed,
    RequestRefused,
    TokenDelta,
)
from serving.engine.kv_cache import BLOCK, KVCache, blocks_of
from serving.engine.loader import Load
from serving.engine.model_runner import ModelRunner
from serving.engine.prefix_cache import PrefixCache
from serving.engine.residency import Residency
from serving.engine.sampler import Sampled, Sampler
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Row, Sequence

logger = logging.getLogger(__name__)


class Warm:
    """A wish to have an adapter in a slot, and perhaps kept there, without a request for it."""

    def __init__(self, adapter: AdapterRef, *, keep: bool = False) -> None:
        self.adapter, self.keep = adapter, keep
        self.held = False  # whether a step should wait for it was asked before


Ticket = Sequence | Warm
Event = tuple[Ticket, TokenDelta | EngineError | None]  # None: the adapter is warm
Outcome = Sampled | RequestFailed


@dataclass(slots=True)
class Counters:
    """Counted since the engine started."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    aborted: int = 0
    failed: int = 0
    paused: int = 0


SOON = 4  # blocks of keys and values that a running request will want before others start


class Chore(Protocol):
    """Work on memory that can be put off for any time, in pieces that take some milliseconds."""

    @property
    def waiting(self) -> bool: ...
    def work(self) -> None: ...


class EngineCore:
    """Every request's state, and `step`, which moves all of them on by one token."""

    def __init__(
        self,
        scheduler: Scheduler,
        cache: KVCache,
        residency: Residency,
        runner: ModelRunner,
        sampler: Sampler,
        prefixes: PrefixCache,
    ) -> None:
        self.scheduler, self.cache, self.residency = scheduler, cache, residency
        self.runner, self.sampler, self.prefixes = runner, sampler, prefixes
        self.warming: dict[Warm, None] = {}
        self.counters = Counters()
        self._stirred = False  # a place was taken or freed since the last pass over the waiting
        # In this pass: whether a request found no memory for its keys and values, and who started.
        self._crowded = False
        self._started: set[Sequence] = set()
        self._unstored: dict[Sequence, None] = {}  # the prefix cache has not seen what they read

    @property
    def has_work(self) -> bool:
        """Tell whether a step would get on; when all wait for loads it would not."""
        return bool(self.scheduler.running) or self._stirred or self.residency.filling

    def holds(self) -> bool:
        """Tell, once for each wish to keep an adapter, whether a step should wait for its load."""
        new = [warm for warm in self.warming if warm.keep and not warm.held]
        for warm in new:
            warm.held = True
        running = bool(self.scheduler.running)
        return running and any(self.residency.is_loading(warm.adapter) for warm in new)

    def add(self, ticket: Ticket, load: Load | None = None) -> None:
        """Take a ticket; `load` is that of its adapter, if it has been begun."""
        if isinstance(ticket, Warm):
            self.warming[ticket] = None
        else:
            self.scheduler.add(ticket)
        if ticket.adapter is not None:
            self.residency.prefetch(ticket.adapter, load)

    def abort(self, ticket: Ticket) -> None:
        """Forget a request; its KV slot and its pin are free at once. Unknown ones are ignored."""
        if isinstance(ticket, Warm):
            self.warming.pop(ticket, None)
        elif ticket in self.scheduler.running or ticket in self.scheduler.waiting:
            self._release(ticket)
            self.counters.aborted += 1

    def release(self, ticket: Ticket) -> None:
        """Keep an adapter no more: whoever waits for a slot may have its."""
        assert isinstance(ticket, Warm)
        self.residency.kept.discard(ticket.adapter.digest)
        self._stirred = True

    def step(self) -> list[Event]:
        """Admit what can be admitted, read and sample one step, and tell what came of it."""
        self.store_read()
        events = self._admit()
        rows = self._with_room(self.scheduler.schedule())
        if not rows:
            return events
        outcomes = self._run(rows)
        self.counters.steps += 1
        for row in rows:
            events += self._publish(row, outcomes.get(row.sequence))
        return events

    def store_read(self) -> None:
        """Give the prefix cache what the last step has read, of those that go on.

        Call it while the step's tokens are written. Otherwise the next step begins with it. Who
        ends gives up its slot, and has stored before that.
        """
        while self._unstored:
            self._store(next(iter(self._unstored)))

    def chores(self) -> list[Chore]:
        """Return what is to be done when there is nothing else to do."""
        each: tuple[Chore, ...] = (self.prefixes.pages, self.residency.stacks.large_pages)
        return [chore for chore in each if chore.waiting]

    def pressing(self) -> Chore | None:
        """Return what may be done between two steps, as every step gains by it.

        Not while a prompt is read or somebody waits for an adapter: those steps are the longest.
        """
        busy = self.warming or any(sequence.unread for sequence in self.scheduler.running)
        chore = self.residency.stacks.large_pages
        return chore if chore.waiting and not busy else None

    def stats(self, base: EngineStats) -> EngineStats:
        """Return `base` with everything that changes filled in."""
        running, counters = self.scheduler.running, self.counters
        return replace(
            base,
            running=len(running),
            waiting=len(self.scheduler.waiting),
            kv_tokens_used=(self.cache.blocks - self.cache.free_blocks) * BLOCK,
            prefix_asked=self.prefixes.asked,
            prefix_found=self.prefixes.found,
            prefix_bytes=self.prefixes.size_bytes,
            resident=self.residency.resident(),
            loading=self._loading(),
            in_memory=self.residency.in_memory,
            adapter_memory_used=self.residency.used_bytes,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            aborted=counters.aborted,
            failed=counters.failed,
            paused=counters.paused,
            adapter_loads=self.residency.loads,
            adapter_evictions=self.residency.evictions,
            load_stages=self.residency.stages(),
        )

    def _admit(self) -> list[Event]:
        events: list[Event] = []
        waiting = self.scheduler.waiting
        self._stirred = self._crowded = False
        self._started.clear()
        self.residency.forget_unwanted(self._wanted())
        if not waiting and not self.warming:
            return events
        for warm in list(self.warming):
            try:
                if not self.residency.ensure(warm.adapter):
                    continue
                if warm.keep:
                    self.residency.keep(warm.adapter)
                events.append((warm, None))
            except AdapterLoadFailed as error:
                events.append((warm, error))
            del self.warming[warm]
            self._stirred = True
        for move in self.scheduler.admit(lambda s: self._ready(s, events)):
            if move.pauses is not None:
                self._pause(move.pauses, move.drops)
            self._start(move.starts)
        self._drain()
        self.residency.forget_unwanted(self._wanted())
        return events

    def _wanted(self) -> Iterator[str]:
        """Yield the digests that somebody waits for."""
        yield from (warm.adapter.digest for warm in self.warming)
        for sequence in self.scheduler.waiting:
            if sequence.adapter is not None:
                yield sequence.adapter.digest

    def _loading(self) -> tuple[AdapterRef, ...]:
        """Return the adapters that somebody waits for and that are in no slot yet."""
        wished = [warm.adapter for warm in self.warming]
        wished += [each.adapter for each in self.scheduler.waiting if each.adapter is not None]
        table = self.residency.table
        return tuple({ref.digest: ref for ref in wished if ref.digest not in table}.values())

    def _ready(self, sequence: Sequence, events: list[Event]) -> bool:
        """Tell whether the adapter is in a slot, and memory for keys and values is free.

        A request whose adapter cannot be worn ends. One whose next tokens are being read for
        another one waits for them. Who finds no memory is not overtaken by who needs less.
        """
        if self._crowded or not self._is_worn(sequence, events) or self.prefixes.awaited(sequence):
            return False
        self._crowded = not self._make_room(sequence)
        return not self._crowded

    def _is_worn(self, sequence: Sequence, events: list[Event]) -> bool:
        if sequence.adapter is None:
            return True
        try:
            # A low request must not drain an adapter that normal ones wear.
            claim = sequence.request.priority == "normal"
            yielding = partial(self._yielding, sequence)
            if not self.residency.ensure(sequence.adapter, claim=claim, yielding=yielding):
                return False
            self._lead(sequence, sequence.adapter)
        except (AdapterLoadFailed, RequestRefused) as error:
            self._release(sequence)
            self.counters.failed += 1
            events.append((sequence, error))
            return False
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Find memory for all tokens of a request that is to start, and what follows soon.

        Others lose theirs for it, but nobody who has started in this pass: tenants could take it
        from each other in turn, and the pass would never end.
        """
        held, now = self.cache.held(sequence.kv_slot), blocks_of(len(sequence.tokens))
        others = sum(_soon(s, self.cache.held(s.kv_slot)) for s in self.scheduler.running)
        missing = now - held + _soon(sequence, now) + others - self.cache.free_blocks
        gives: dict[Sequence, int] = {}
        for giver in self.scheduler.givers(sequence) if missing > 0 else ():
            if missing > sum(gives.values()) and giver not in self._started:
                gives[giver] = self._gives(giver)
        if missing > sum(gives.values()):
            return False
        for giver in gives:
            self._take_memory(giver)
        return True

    def _gives(self, sequence: Sequence) -> int:
        """Return the blocks that are free for others when a request is dropped."""
        held = self.cache.held(sequence.kv_slot)
        return held + (_soon(sequence, held) if sequence in self.scheduler.running else 0)

    def _with_room(self, rows: list[Row]) -> list[Row]:
        """Return the rows of a step that have memory for what they write.

        Whoever needs more takes it from the last one, which may be itself.
        """
        for row in rows:
            slot = row.sequence.kv_slot
            while row.sequence in self.scheduler.running and not self.cache.reserve(slot, row.stop):
                self._take_memory(self.scheduler.last())
        return [row for row in rows if row.sequence in self.scheduler.running]

    def _take_memory(self, sequence: Sequence) -> None:
        """Pause a request, if it runs, and forget its keys and values: it will read them again."""
        if sequence in self.scheduler.running:
            self._leave(sequence)
            self.counters.paused += 1
        self.scheduler.drop(sequence)
        self._forget(sequence)

    def _lead(self, sequence: Sequence, adapter: AdapterRef) -> None:
        """Put the adapter's virtual tokens before the prompt. Raises RequestRefused."""
        vectors = self.residency.vectors(adapter)
        if vectors is None or sequence.virtual == vectors.virtual:
            return
        wanted = len(sequence.tokens) + sequence.sampling.max_tokens
        if vectors.virtual + wanted > self.cache.length:
            raise RequestRefused(
                f"The prompt and max_tokens make {wanted} tokens, {adapter.label} has "
                f"{vectors.virtual} positions before them, this model takes {self.cache.length}."
            )
        sequence.lead(vectors.virtual)

    def _yielding(self, to: Sequence) -> set[str]:
        """Return the adapters whose wearers all give way to a waiting request."""
        yielding = set(self.scheduler.yielding(to.request))
        gone, stays = set[str](), set[str]()
        for running in self.scheduler.running:
            if running.adapter is not None:
                (gone if running in yielding else stays).add(running.adapter.digest)
        return gone - stays

    def _drain(self) -> None:
        """Pause who wears what is in a claimed slot, if all of them yield to who waits for it."""
        for waiting in self.scheduler.waiting:
            draining = self.residency.draining_for(waiting.adapter)
            if not draining or not self._yielding(waiting).issuperset(draining):
                continue
            for running in list(self.scheduler.running):
                if running.adapter is not None and running.adapter.digest in draining:
                    self._pause(running, self.scheduler.pause(running))

    def _start(self, sequence: Sequence) -> None:
        """Take a KV slot, unless it kept one over a pause, and pin the adapter."""
        new = sequence.kv_slot < 0
        if new:
            sequence.kv_slot = self.cache.take()
        room = self.cache.reserve(sequence.kv_slot, len(sequence.tokens))
        assert room, "a request that is ready has room"
        if new:
            self.prefixes.load(sequence)
            self._write_prefix(sequence)
        if sequence.adapter is not None:
            self.residency.table.pin(sequence.adapter.digest)
            sequence.share = self.residency.share(sequence.adapter)
            sequence.is_new = self.residency.is_new(sequence.adapter)
        self._stirred = True
        self._started.add(sequence)

    def _write_prefix(self, sequence: Sequence) -> None:
        """Put learned keys and values into a new slot, unless they came from the prefix cache."""
        vectors = self.residency.vectors(sequence.adapter) if sequence.adapter else None
        if vectors is not None and vectors.prefix is not None:
            self.cache.write(sequence.kv_slot, *vectors.prefix)
            sequence.computed = max(sequence.computed, vectors.virtual)

    def _pause(self, sequence: Sequence, dropped: Sequence | None) -> None:
        self._leave(sequence)
        if dropped is not None:
            self._forget(dropped)
        self.counters.paused += 1

    def _run(self, rows: Rows[Row]) -> dict[Sequence, Outcome]:
        """Run and sample; halve the rows until whoever makes the step fail, fails alone.

        Repeating rows is safe: a position's keys and values come out the same again, and a
        request's random numbers belong to its tokens, not to how often they are asked for.
        """
        try:
            logits, sequences = self.runner.run(rows)
            outcomes = self.sampler.choose(logits, sequences) if sequences else []
            return dict(zip(sequences, outcomes, strict=True))
        except torch.AcceleratorError:
            raise  # the device's context is lost: no half of the rows can run
        except Exception as error:  # whatever it is, it must not reach the other requests
            if len(rows) > 1:
                half = len(rows) // 2
                return self._run(rows[:half]) | self._run(rows[half:])
            request = rows[0].sequence.request
            logger.exception("request %s failed in a step", request.request_id)
            failure = RequestFailed(f"Request {request.request_id} failed while running: {error!r}")
            failure.__cause__ = error
            return {rows[0].sequence: failure}

    def _publish(self, row: Row, outcome: Outcome | None) -> Iterator[Event]:
        sequence = row.sequence
        if isinstance(outcome, RequestFailed):
            self._release(sequence)
            self.counters.failed += 1
            yield sequence, outcome
            return
        self.counters.prompt_tokens += row.new_prompt_tokens
        self.scheduler.charge(row, sampled=outcome is not None)
        sequence.advance(row)
        self._unstored[sequence] = None
        if outcome is None:
            return
        self.counters.generated_tokens += 1
        sequence.tokens.append(outcome.token_id)
        delta = self._delta(sequence, outcome)
        if delta.finish_reason:
            self._release(sequence)
        yield sequence, delta

    def _delta(self, sequence: Sequence, sampled: Sampled) -> TokenDelta:
        params, constraint = sequence.sampling, sequence.constraint
        if sampled.token_id in self.sampler.eos_ids and (constraint or not params.ignore_eos):
            return TokenDelta((), (), "stop", sequence.produced, sequence.cached_prompt)
        reason: FinishReason | None = "length" if sequence.produced >= params.max_tokens else None
        if constraint is not None and constraint.advance(sampled.token_id):
            reason = "stop"
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        return TokenDelta(
            (sampled.token_id,), logprobs, reason, sequence.produced, sequence.cached_prompt
        )

    def _release(self, sequence: Sequence) -> None:
        """End a request and free what it holds: a running one all, a paused one perhaps KV."""
        self._store(sequence)
        if sequence in self.scheduler.running:
            self._leave(sequence)
        if sequence.kv_slot >= 0:
            self._forget(sequence)
        self.scheduler.remove(sequence)
        self._stirred = True

    def _store(self, sequence: Sequence) -> None:
        if sequence in self._unstored:
            del self._unstored[sequence]
            self.prefixes.store(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Let nobody wait for what a request was about to read, and unpin its adapter."""
        self.prefixes.leave(sequence)
        if sequence.adapter is not None:
            self.residency.table.unpin(sequence.adapter.digest)
        self._stirred = True

    def _forget(self, sequence: Sequence) -> None:
        """Give back the KV slot, clean."""
        self.cache.release(sequence.kv_slot)
        sequence.kv_slot = -1


def _soon(sequence: Sequence, held: int) -> int:
    """Return how many blocks a request will want soon beside those it holds."""
    return min(SOON, blocks_of(sequence.prompt_length + sequence.sampling.max_tokens) - held)
