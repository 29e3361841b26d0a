"""Which sequences take part in a step, and with how many tokens."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from serving.engine.boundary import GenerateRequest, Priority
from serving.engine.fair_queue import FairQueue
from serving.engine.sequence import Row, Sequence

STRETCH = 3  # times as long as without prompts: the most that a step with prompts should take
READING_ADAPTERS = 0.5  # times the base, at most: more of it hides behind what rows compute
SITS_OUT = 3  # steps in a row at most, for prompts of a tenant that has had less
LOW_SHARE = 8  # beside normal requests, low ones get one token in so many


@dataclass(frozen=True, slots=True)
class Move:
    """A request starts, perhaps in the place of another one."""

    starts: Sequence
    pauses: Sequence | None = None
    drops: Sequence | None = None  # a paused one that loses its keys and values for it


class Scheduler:
    """Waiting requests by priority, tenant and arrival; running ones in order of admission."""

    def __init__(
        self, max_running: int, max_parked: int, max_batched_tokens: int, ridge: int
    ) -> None:
        """Plan for a device that reads the weights in the time that it computes `ridge` tokens.

        Of the paused requests, `max_parked` keep their keys and values.
        """
        self.max_running, self.max_parked = max_running, max_parked
        self.max_batched_tokens, self.ridge = max_batched_tokens, ridge
        self.queues: dict[Priority, FairQueue] = {"normal": FairQueue(), "low": FairQueue()}
        self.running: dict[Sequence, None] = {}
        self.parked: dict[Sequence, None] = {}  # waiting again, with keys and values

    @property
    def waiting(self) -> list[Sequence]:
        return [sequence for queue in self.queues.values() for sequence in queue]

    def add(self, sequence: Sequence) -> None:
        self._queue(sequence).add(sequence)

    def admit(self, ready: Callable[[Sequence], bool]) -> Iterator[Move]:
        """Yield who starts now. Before the next is asked for, the caller does what it says.

        Between tenants the Virtual Token Counter decides, inside one it is first come first
        served. Who is not `ready` (its adapter is on its way) is passed over, not waited for.
        `ready` is asked only when there is a place. It may take the request out of the queue, and
        pause others.
        """
        for priority in self.queues:
            while move := self._next(priority, ready):
                yield move

    def schedule(self) -> list[Row]:
        """Plan a step: normal requests, then low ones in what is left.

        Beside normal requests low ones get a small share of the step only, since every row makes
        it longer; the other low ones keep their place and their state, and wait.
        """
        rows = self._plan("normal", self.max_batched_tokens)
        tokens = sum(row.count for row in rows)
        left = self.max_batched_tokens - tokens
        return rows + self._plan("low", min(left, max(1, tokens // LOW_SHARE)) if rows else left)

    def charge(self, row: Row, sampled: bool) -> None:
        """Count what was computed for a row's tenant; call it before the row's `advance`."""
        queue, tenant = self._queue(row.sequence), row.sequence.request.tenant
        queue.charge(tenant, row.new_prompt_tokens + row.repeated, int(sampled))

    def remove(self, sequence: Sequence) -> None:
        self._queue(sequence).remove(sequence)
        self.running.pop(sequence, None)
        self.parked.pop(sequence, None)

    def _next(self, priority: Priority, ready: Callable[[Sequence], bool]) -> Move | None:
        for line in self.queues[priority].lines(self._unread(priority)):
            if self._is_full and self._victim(line[0].request) is None:
                continue
            if sequence := next(filter(ready, line), None):
                return self._start(sequence)
        return None

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self.max_running

    def yielding(self, to: GenerateRequest) -> list[Sequence]:
        """Return who gives its place to a waiting request, the newest first.

        Every low one does to a normal one. Inside a class those do whose tenant has had more, and
        runs more also after the exchange: so two tenants cannot take a place from each other in
        turn.
        """
        rows, counter = self._rows(to.priority), self.queues[to.priority].counter

        def yields(own: GenerateRequest) -> bool:
            if own.priority != to.priority:
                return to.priority == "normal"
            less = counter(to.tenant) <= counter(own.tenant)
            return less and rows[own.tenant] >= rows[to.tenant] + 2

        return [running for running in reversed(self.running) if yields(running.request)]

    def pause(self, sequence: Sequence) -> Sequence | None:
        """Put a running request before all that wait of its tenant.

        Return who must lose its keys and values for want of memory, if anybody: a low one, else
        the one that was paused first and is going to be the last to go on. It will read all its
        tokens again.
        """
        del self.running[sequence]
        self._queue(sequence).put_back(sequence)
        self.parked[sequence] = None
        if len(self.parked) <= self.max_parked:
            return None
        dropped = min(self.parked, key=_is_normal)
        self.drop(dropped)
        return dropped

    def drop(self, sequence: Sequence) -> None:
        """Note that a request loses its keys and values, and is paused by that if it runs."""
        if sequence in self.running:
            del self.running[sequence]
            self._queue(sequence).put_back(sequence)
        else:
            del self.parked[sequence]
        sequence.computed = 0

    def givers(self, to: Sequence) -> list[Sequence]:
        """Return whose keys and values a waiting request may have the memory of, in this order.

        Low ones come first, and in each class the paused ones. Those that run are `yielding`, and
        so they would be after all before them have given theirs. Paused normal ones keep theirs
        from a low one while anybody runs.
        """
        own, rows = to.request, self._rows(to.request.priority)
        running: list[Sequence] = []
        for sequence in self.yielding(own):
            other = sequence.request
            if other.priority == own.priority:
                if rows[other.tenant] < rows[own.tenant] + 2:
                    continue
                rows[other.tenant] -= 1
            running.append(sequence)
        spares = own.priority == "low" and self.running
        parked = [s for s in self.parked if s is not to and not (spares and _is_normal(s))]
        return sorted([*parked, *running], key=_is_normal)

    def last(self) -> Sequence:
        """Return who has to give memory when those that run have no more.

        A low one, a paused one before those that run, and of these the newest; else a normal one,
        in the same order. So of the normal ones that run the oldest always goes on.
        """
        return min([*self.parked, *reversed(self.running)], key=_is_normal)

    def _victim(self, to: GenerateRequest) -> Sequence | None:
        """Return the newest low one, else the newest of whoever runs most."""
        yielding, rows = self.yielding(to), self._rows(to.priority)
        low = (running for running in yielding if running.request.priority != to.priority)
        return next(low, None) or max(
            yielding, key=lambda running: rows[running.request.tenant], default=None
        )

    def _start(self, sequence: Sequence) -> Move:
        victim = self._victim(sequence.request) if self._is_full else None
        self._queue(sequence).remove(sequence)
        self.parked.pop(sequence, None)
        dropped = None if victim is None else self.pause(victim)
        self.running[sequence] = None
        return Move(sequence, victim, dropped)

    def _plan(self, priority: Priority, tokens: int) -> list[Row]:
        """Return a token for each decoding sequence, then prompt chunks, the least served first.

        Every prompt token makes the step longer for those that decode. Reading the weights takes
        as long as computing `ridge` tokens, so a step of n tokens takes about ridge + n, and with
        STRETCH (ridge + decoding) - ridge tokens it takes STRETCH times as long as without prompts.
        It may take once more when some sit out: fewer wait for it, and a whole prompt may fit in.
        A prompt that needs several steps is read in even parts: none is longer than it has to be.
        Right after a load call it is read in a part more: those that run have waited for the load,
        and a step with a part of this prompt should not be longer than such a wait.
        """
        running, due = self._of(priority), self._due(priority)
        out = self._sit_out(priority, running, due)
        here = [sequence for sequence in running if sequence not in out]
        rows = [Row(s, s.computed, 1) for s in here if s.remaining == 1][:tokens]
        budget = tokens - len(rows)
        if decoding := sum(s.remaining == 1 for s in running):
            ridge = self.ridge * (1 + _worn(running))
            longest = (STRETCH + bool(out)) * (ridge + decoding)
            budget = min(budget, int(longest - ridge) - len(rows))
        prompts = [sequence for sequence in here if sequence.unread]
        for sequence in sorted(prompts, key=lambda s: due[s.request.tenant]):
            if budget > 0:
                parts = math.ceil(sequence.unread / budget)
                if decoding and sequence.is_new and parts > 1:
                    sequence.part = sequence.part or math.ceil(sequence.unread / (parts + 1))
                if decoding and sequence.part:
                    parts = max(parts, math.ceil(sequence.unread / sequence.part))
                count = math.ceil(sequence.unread / parts)
                rows.append(Row(sequence, sequence.computed, count))
                budget -= count
        return rows

    def _sit_out(
        self, priority: Priority, running: list[Sequence], due: Mapping[str, int]
    ) -> set[Sequence]:
        """Return who takes no part in the step, so that first tokens of others come sooner.

        While a prompt is read, that is whoever has had more than its tenant will have had then.
        Who sits out goes on later, with the same numbers. Nobody does for what is no tenant's.
        """
        counter = self.queues[priority].counter
        reading = {s.request.tenant for s in running if s.unread}
        least = min((due[tenant] for tenant in reading if tenant), default=math.inf)
        out = set[Sequence]()
        for sequence in running:
            if counter(sequence.request.tenant) > least and sequence.sat_out < SITS_OUT:
                out.add(sequence)
            sequence.sat_out = sequence.sat_out + 1 if sequence in out else 0
        return out

    def _due(self, priority: Priority) -> dict[str, int]:
        """Return what each tenant that runs will have had when its prompts are read."""
        counter, unread = self.queues[priority].counter, self._unread(priority)
        return {tenant: counter(tenant) + tokens for tenant, tokens in unread.items()}

    def _of(self, priority: Priority) -> list[Sequence]:
        return [running for running in self.running if running.request.priority == priority]

    def _rows(self, priority: Priority) -> Counter[str]:
        """Return how many requests of a class each tenant runs."""
        return Counter(running.request.tenant for running in self._of(priority))

    def _unread(self, priority: Priority) -> Counter[str]:
        unread: Counter[str] = Counter()
        for running in self._of(priority):
            unread[running.request.tenant] += running.unread
        return unread

    def _queue(self, sequence: Sequence) -> FairQueue:
        return self.queues[sequence.request.priority]


def _is_normal(sequence: Sequence) -> bool:
    return sequence.request.priority == "normal"


def _worn(running: list[Sequence]) -> float:
    """Return what the adapters of those that decode make a step longer, in readings of the base."""
    decoding = [s for s in running if s.remaining == 1 and s.adapter is not None]
    return min(sum({s.adapter: s.share for s in decoding}.values()), READING_ADAPTERS)
