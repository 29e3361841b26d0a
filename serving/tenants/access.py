"""What a tenant may see and change: its own namespace, and to use, what is shared with it.

Everything else does not exist for it: the same answer as for a name that nobody has.
"""

import asyncio
import time
from collections.abc import Callable

from registry.adapter import AdapterName
from registry.errors import AdapterNotFound, StoreUnavailable
from registry.store import Registry
from serving.tenants.keys import FRESH_SECONDS, STALE_SECONDS, Principal


class Access:
    """Answers from the shares as they were at most a second ago."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._shares: frozenset[tuple[AdapterName, str]] = frozenset()
        self._read_at = float("-inf")

    async def require_use(self, principal: Principal, name: AdapterName) -> None:
        """Raises AdapterNotFound for what this caller may not use, and StoreUnavailable."""
        if not owns(principal, name) and (name, principal.tenant) not in await self._current():
            raise unseen(name)

    async def usable(self, principal: Principal) -> Callable[[AdapterName], bool]:
        """Return a test of names, for many at one moment."""
        shares = await self._current()
        return lambda name: owns(principal, name) or (name, principal.tenant) in shares

    async def _current(self) -> frozenset[tuple[AdapterName, str]]:
        moment = time.monotonic()  # before the read, so that an old answer is not taken for new
        age = moment - self._read_at
        if age < FRESH_SECONDS:
            return self._shares
        try:
            rows = await asyncio.to_thread(self._registry.shares)
        except StoreUnavailable:
            if age < STALE_SECONDS:
                return self._shares
            raise
        self._shares = frozenset((row.name, row.tenant) for row in rows)
        self._read_at = moment
        return self._shares


def owns(principal: Principal, name: AdapterName) -> bool:
    return principal.is_operator or name.namespace == principal.tenant


def require_own(principal: Principal, name: AdapterName) -> None:
    """Raises AdapterNotFound for what this caller may not change."""
    if not owns(principal, name):
        raise unseen(name)


def unseen(name: AdapterName) -> AdapterNotFound:
    return AdapterNotFound(f"There is no adapter {name} here.")
