"""Refuses early whoever comes back while its queue is still full.

A tenant that floods is refused a hundred times a second, on the cores that compute everybody's
answers. Who was refused once, after its key, its scope and its address were found right, is
refused here without all that: the same key at the same address, for a second at most (as long as
a key is believed without a look at the store), and only while the engine has no room for it.
"""

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from litestar.types import HTTPScope

from serving.api.record import RequestRecord
from serving.engine.boundary import Engine, EngineBusy
from serving.tenants.keys import FRESH_SECONDS
from serving.tenants.meter import Lease

MAX_TURNED_AWAY = 1024  # keys and addresses; whoever does not fit goes the whole way


@dataclass(frozen=True, slots=True)
class _TurnedAway:
    """What is known of who was refused."""

    until: float  # on the loop's clock
    tenant: str
    route: str
    lease: Lease | None  # for its headers; it is settled


class Door:
    """Belongs to one event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turned_away: OrderedDict[bytes, _TurnedAway] = OrderedDict()

    def check(self, scope: HTTPScope, record: RequestRecord) -> None:
        """Raise EngineBusy for who was turned away and still has no room."""
        known = self._turned_away.get(_caller(scope, record)) if self._turned_away else None
        if known is None or known.until < asyncio.get_running_loop().time():
            return
        try:
            self._engine.check_room(known.tenant)
        except EngineBusy:
            record.tenant, record.lease = known.tenant, known.lease
            scope["path_template"] = known.route
            raise

    def turned_away(self, scope: HTTPScope, record: RequestRecord) -> None:
        """Remember who was refused after it went the whole way."""
        until = asyncio.get_running_loop().time() + FRESH_SECONDS
        caller = _caller(scope, record)
        self._turned_away[caller] = _TurnedAway(
            until, record.tenant, scope["path_template"], record.lease
        )
        self._turned_away.move_to_end(caller)
        if len(self._turned_away) > MAX_TURNED_AWAY:
            self._turned_away.popitem(last=False)


def _caller(scope: HTTPScope, record: RequestRecord) -> bytes:
    """Return a digest of who calls what: the key itself is kept nowhere."""
    keys = [value for name, value in scope["headers"] if name == b"authorization"]
    facts = (scope["method"], scope["path"], record.host_tenant, keys)
    return hashlib.sha256(repr(facts).encode()).digest()
