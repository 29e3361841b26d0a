"""A clock that tests turn, servers that join each other, and what one answer does to a meter."""

import threading
from datetime import UTC, datetime, timedelta

from registry.errors import WardrobeError
from serving.tenants.limit import Subject
from serving.tenants.meter import Lease, Meter
from serving.tenants.standing import Clock, Period
from serving.tenants.usage import Span

ACME = Subject("acme")
NAME = "acme/support"
DIGEST = "d" * 64
ALWAYS = Span("2000", "2100")


class Still(Clock):
    """A clock and a calendar that only move when they are told to."""

    def __init__(self) -> None:
        self._passed = 0.0  # seconds
        super().__init__(self._seconds, self._period)

    def _seconds(self) -> float:
        return 1000.0 + self._passed

    def _period(self) -> Period:
        return Period(datetime(2026, 11, 25, 13, 59, tzinfo=UTC) + timedelta(seconds=self._passed))

    def pass_(self, seconds: float) -> None:
        self._passed += seconds


def joined(new: Meter, others: list[Meter]) -> Meter:
    """Let a server join those that run; each notices when it writes next."""
    joining = threading.Thread(target=new.join)
    joining.start()
    while joining.is_alive():
        for other in others:
            other.flush()
        joining.join(0.005)
    return new


def limit(meter: Meter, subject: Subject = ACME, **values: int | None) -> None:
    meter.ledger.set_limit(subject, values, actor="test", reason="test")


def enter(meter: Meter, tenant: str = "acme", name: str = NAME) -> Lease:
    lease = meter.lease(tenant, name)
    lease.enter()
    return lease


def begin(meter: Meter, prompt: int, answer: int, tenant: str = "acme", name: str = NAME) -> Lease:
    lease = enter(meter, tenant, name)
    try:
        lease.reserve(prompt, answer)
    except WardrobeError:
        end(lease, 0, 0)
        raise
    return lease


def end(lease: Lease, prompt: int, completion: int) -> None:
    lease.settle(digest=DIGEST, version=f"{NAME}@v1", prompt=prompt, completion=completion)


def headers(lease: Lease) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in lease.headers}


def used(meter: Meter) -> int:
    return sum(row.total_tokens for row in meter.ledger.usage(ALWAYS, "hour"))
