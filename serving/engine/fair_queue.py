"""Who of the waiting is next: between tenants by what each has had, inside one by arrival.

The Virtual Token Counter of Sheng et al., Fairness in Serving Large Language Models, OSDI 2024
(arXiv 2401.00588): a tenant's counter grows with the tokens computed for it, and the tenant with
the least is served next. Two tenants that always have requests waiting differ by no more than
about what one full batch is worth, for ever. Nothing is reserved: a tenant alone gets everything.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from serving.engine.sequence import Sequence

PROMPT_WEIGHT = 1  # of one token, as in the paper
OUTPUT_WEIGHT = 2
CREDIT = 2048  # virtual tokens that a tenant may have saved up while it asked for little


class FairQueue:
    """The waiting requests of one priority class, and every tenant's counter in it."""

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[Sequence, None]] = {}  # only tenants that wait
        self._counters: dict[str, int] = {}
        self._last = ""  # the tenant that was the last to have nothing waiting any more

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._waiting.values():
            yield from line

    def counter(self, tenant: str) -> int:
        return self._counters.get(tenant, 0)

    def add(self, sequence: Sequence) -> None:
        """Put a new request at the end of its tenant's line.

        A tenant that had none waiting is lifted to the least counter of those that have, or of the
        last one that had: while it asks for little it saves up no more than `CREDIT`. Those that
        only run do not count, or the newcomer would inherit what they left to others.
        """
        tenant = sequence.request.tenant
        if tenant not in self._waiting:
            least = min(map(self.counter, self._waiting), default=self.counter(self._last))
            self._counters[tenant] = max(self.counter(tenant), least - CREDIT)
        self._line(tenant)[sequence] = None

    def put_back(self, sequence: Sequence) -> None:
        """Put a request that was paused before everything else of its tenant."""
        line = self._line(sequence.request.tenant)
        line[sequence] = None
        line.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        line = self._waiting.get(tenant, {})
        line.pop(sequence, None)
        if not line and self._waiting.pop(tenant, None) is not None:
            self._last = tenant

    def charge(self, tenant: str, read: int, sampled: int) -> None:
        """Count tokens that were computed for a tenant."""
        cost = PROMPT_WEIGHT * read + OUTPUT_WEIGHT * sampled
        self._counters[tenant] = self.counter(tenant) + cost

    def lines(self, unread: Mapping[str, int]) -> list[list[Sequence]]:
        """Return each tenant's waiting requests, the tenant that is next first.

        `unread` are the tokens that its running requests are still to read before they decode:
        without them one tenant would get every place that is free at the same moment.
        """

        def due(tenant: str) -> int:
            return self.counter(tenant) + PROMPT_WEIGHT * unread.get(tenant, 0)

        return [list(self._waiting[tenant]) for tenant in sorted(self._waiting, key=due)]

    def _line(self, tenant: str) -> OrderedDict[Sequence, None]:
        return self._waiting.setdefault(tenant, OrderedDict())
