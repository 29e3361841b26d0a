"""What a query gives, asked again only when its database was written."""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from registry.database import Closing

T = TypeVar("T")


class Latest(Generic[T]):
    """An answer that is followed by asking often. A query takes a thread, its rows and its time
    from a step that computes on all cores; that nothing was written is known in microseconds.
    """

    def __init__(self, store: Closing, query: Callable[[], T]) -> None:
        self._store, self._query = store, query
        self._seen: int | None = None
        self._answer: T | None = None

    async def get(self) -> T:
        """Return what the query gives now. Raises what it raises, and asks again the next time."""
        revision = self._store.revision()  # before the query: what comes later is not missed
        if self._answer is None or revision is None or revision != self._seen:
            self._answer = await asyncio.to_thread(self._query)
            self._seen = revision
        return self._answer
