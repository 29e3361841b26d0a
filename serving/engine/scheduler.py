"""Which sequences take part in a step, and with how many tokens."""

from collections.abc import Callable

from serving.engine.sequence import Row, Sequence


class Scheduler:
    """Waiting requests in order of arrival, running sequences in order of admission."""

    def __init__(self, max_batched_tokens: int) -> None:
        self.max_batched_tokens = max_batched_tokens
        self.waiting: dict[Sequence, None] = {}  # ordered, and cheap to take out of the middle
        self.running: dict[Sequence, None] = {}

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence] = None

    def admit(self, has_room: Callable[[], bool], ready: Callable[[Sequence], bool]) -> None:
        """Move waiting requests to the running ones, first come first served.

        One that is not ready (its adapter is on its way) is passed over, not waited for; it keeps
        its place. `ready` is asked only when there is room, and True means the place is taken.
        """
        for sequence in list(self.waiting):
            if not has_room():
                return
            if ready(sequence):
                del self.waiting[sequence]
                self.running[sequence] = None

    def schedule(self) -> list[Row]:
        """Plan a step: a token for each decoding sequence, then prompt chunks up to the bound."""
        rows = [Row(s, s.computed, 1) for s in self.running if s.remaining == 1]
        budget = self.max_batched_tokens - len(rows)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                count = min(budget, sequence.remaining)
                rows.append(Row(sequence, sequence.computed, count))
                budget -= count
        return rows

    def remove(self, sequence: Sequence) -> None:
        self.waiting.pop(sequence, None)
        self.running.pop(sequence, None)
