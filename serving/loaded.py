"""Adapters that the operator has asked this server to hold, under names of the operator's choice.

What vLLM's clients do with a path is done here with a version of the registry: it is loaded and
checked, it keeps its slot until it is unloaded, and `model` may be the name. Names belong to this
server and end with it; only the operator's keys see them.
"""

import asyncio
from collections.abc import Awaitable, Callable

from registry.adapter import AdapterRef, Version
from registry.errors import Conflict, NotFound
from serving.engine.boundary import Engine
from serving.tenants.keys import Principal


class AdapterNotLoaded(NotFound):
    code = "adapter_not_loaded"


class LoadedAdapters:
    """Belongs to one event loop."""

    def __init__(self, engine: Engine, keep_ready: Callable[[Version], Awaitable[None]]) -> None:
        """`keep_ready` is `selfcheck.make_ready` that keeps."""
        self._engine, self._keep_ready = engine, keep_ready
        self._versions: dict[str, Version] = {}
        self._changing = asyncio.Lock()  # two loads of one name must not both be told it is free

    @property
    def versions(self) -> dict[str, Version]:
        return self._versions

    def of(self, model: str, principal: Principal) -> Version | None:
        """Return what a name means for this caller."""
        return self._versions.get(model) if principal.is_operator else None

    async def load(self, name: str, version: Version, *, again: bool) -> None:
        """Hold a version under a name; `again` lets the name mean another version from now on.

        The name means what it meant until the version is in its slot and has passed its
        self-check. Raises Conflict for a name that is taken, and what `Engine.keep` and the check
        raise.
        """
        async with self._changing:
            before = self._versions.get(name)
            if before is not None and not again:
                raise Conflict(
                    f"The lora adapter {name!r} has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True."
                )
            try:
                await self._keep_ready(version)
            except BaseException:  # a client that went away, too
                await self._let_go(version)
                raise
            self._versions[name] = version
            await self._let_go(before)

    async def unload(self, name: str) -> None:
        """Forget a name; what runs on it goes on. Raises AdapterNotLoaded."""
        async with self._changing:
            if name not in self._versions:
                raise AdapterNotLoaded(f"The lora adapter {name!r} cannot be found.")
            await self._let_go(self._versions.pop(name))

    async def _let_go(self, version: Version | None) -> None:
        held = [each.digest for each in self._versions.values()]
        ref: AdapterRef | None = version.adapter if version else None
        if ref is not None and ref.digest not in held:
            await self._engine.release(ref)
