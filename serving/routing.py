"""From the `model` of a request to the version that runs: by digest, never by name.

An alias is answered from the *live table*: versions that have been warmed and have answered a
self-check in this server. Requests hold the version they resolved and never look again.
"""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from registry.adapter import BASE, PRODUCTION, AdapterName, AdapterRef, Selector, Shot, Version
from registry.base import BaseModel
from registry.errors import AdapterNotFound, BaseMismatch, InvalidName, WardrobeError
from registry.records import Endpoint
from registry.store import Registry
from registry.whole import refuse_whole
from serving.endpoints import LiveEndpoints
from serving.loaded import LoadedAdapters
from serving.tenants.access import Access
from serving.tenants.keys import Principal

FIRST_LIVE_SECONDS = 10.0  # how long a request waits for the first version of a new alias
FIRST_LIVE_POLL_SECONDS = 0.02
STALE_AFTER_SECONDS = 1.0
SYSTEM_PROMPT = "system_prompt"  # the one default of an endpoint that is no field of a request
MAX_PINNED = 1024

AliasKey = tuple[AdapterName, str]


class ModelNotLive(WardrobeError):
    """The alias exists, and no version of it is live in this server."""

    code = "adapter_not_live"


class ModelStillLoads(ModelNotLive):
    """Not live yet: trying again helps."""


@dataclass(frozen=True, slots=True)
class Route:
    """What one request runs, from admission to its last byte."""

    label: str  # acme/support@v7, or the base's id
    fingerprint: str  # the version's digest, or the base's weights: 64 hex digits
    adapter: AdapterRef | None = None
    name: str = BASE  # what was called, whatever version of it runs: acme/support
    system_prompt: str = ""
    examples: tuple[Shot, ...] = ()
    production_of: AdapterName | None = None  # whose alias was followed; an experiment may split it
    endpoint: Endpoint | None = None  # what was asked for, when it was one
    experiment: str = ""
    arm: str = ""
    blind: bool = False  # the answer does not say which version it was

    @classmethod
    def to(cls, version: Version) -> "Route":
        return cls(
            version.ref.label,
            version.digest,
            version.adapter,
            str(version.name),
            version.system_prompt,
            version.examples,
        )

    def behind(self, endpoint: Endpoint | None) -> "Route":
        """Return the route as an endpoint answers it.

        A version that brings a system prompt keeps it: with it, it was made and judged.
        """
        if endpoint is None:
            return self
        prompt = self.system_prompt or endpoint.defaults.get(SYSTEM_PROMPT, "")
        return replace(self, name=str(endpoint.name), endpoint=endpoint, system_prompt=prompt)

    @property
    def only_prompt(self) -> bool:
        """Whether all that makes it special stands before the messages."""
        return self.adapter is None and bool(self.system_prompt or self.examples)

    @property
    def shown_as(self) -> str:
        """What the answer calls itself."""
        return self.experiment if self.blind else self.label

    @property
    def system_fingerprint(self) -> str:
        return f"fp_{self.experiment if self.blind else self.fingerprint[:16]}"


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """A version that an alias points to and that this server could not bring live."""

    name: AdapterName
    alias: str
    number: int
    sentence: str


@dataclass(slots=True)
class LiveTable:
    """What every alias means in this server now. Written by the follower, read by the router."""

    versions: dict[AliasKey, Version] = field(default_factory=dict[AliasKey, Version])
    failures: dict[AliasKey, FailedRollout] = field(default_factory=dict[AliasKey, FailedRollout])
    read_at: float = field(default_factory=time.monotonic)  # last good look at the registry

    @property
    def stale(self) -> bool:
        return time.monotonic() - self.read_at > STALE_AFTER_SECONDS


class Router:
    """Resolves selectors. Aliases from the live table; numbers and digests from the registry."""

    def __init__(
        self,
        registry: Registry,
        base: BaseModel,
        live: LiveTable,
        access: Access,
        endpoints: LiveEndpoints,
        loaded: LoadedAdapters,
    ) -> None:
        self._registry = registry
        self._endpoints = endpoints
        self._loaded = loaded
        self._base = base
        self._live = live
        self._access = access
        self._pinned: OrderedDict[Selector, Version] = OrderedDict()  # immutable, so never stale

    @property
    def base_route(self) -> Route:
        return Route(self._base.id, self._base.fingerprint)

    def is_base(self, model: str) -> bool:
        return model in (BASE, self._base.id)

    async def resolve(self, model: str, principal: Principal) -> Route:
        """Return what `model` means now, for this caller.

        Raises NotFound, Refused, ModelNotLive, StoreUnavailable; never falls back to the base.
        """
        if self.is_base(model):
            return self.base_route
        if loaded := self._loaded.of(model, principal):
            return Route.to(loaded)
        if endpoint := self._endpoints.of(model, principal):
            version, selector = await self.version_of(endpoint), endpoint.target
        else:
            selector = _selector(model, principal.namespace)
            version = await self._version(selector, principal)
        route = Route.to(version) if version else self.base_route
        if version and selector and selector.alias == PRODUCTION:
            route = replace(route, production_of=version.name)
        return route.behind(endpoint)

    async def version(self, model: str, principal: Principal) -> Version:
        """Return the version of a selector. Raises as `resolve` does."""
        return await self._version(_selector(model, principal.namespace), principal)

    def runs(self, version: Version) -> bool:
        """Tell whether a version was made for the base of this server."""
        return version.base_id == self._base.id

    def learn(self, version: Version) -> None:
        """Know a version by its number without asking the registry: it never changes."""
        self._remember(Selector(version.name, number=version.number), version)

    def known(self, target: Selector) -> Version | None:
        """Return what a selector means now, as far as this server knows without asking."""
        if target.alias is not None:
            return self._live.versions.get((target.name, target.alias))
        return self._pinned.get(target)

    async def version_of(self, endpoint: Endpoint) -> Version | None:
        """Return the version an endpoint means now, None for the base. Raises as `resolve` does.

        It is followed with the rights of its tenant, whoever asks.
        """
        owner = Principal(endpoint.name.namespace, frozenset())
        return await self._version(endpoint.target, owner) if endpoint.target else None

    async def _version(self, selector: Selector, principal: Principal) -> Version:
        await self._access.require_use(principal, selector.name)
        ask = self._pin if selector.alias is None else self._first_version
        version = self.known(selector) or await ask(selector)
        self._check_base(version)
        refuse_whole(version)
        return version

    async def _pin(self, selector: Selector) -> Version:
        version = await asyncio.to_thread(self._registry.resolve, selector)
        # The beginning of a digest may become ambiguous with a later push: only whole ones stay.
        if selector.number is not None or selector.digest == version.digest:
            self._remember(selector, version)
        return version

    def _remember(self, selector: Selector, version: Version) -> None:
        self._pinned[selector] = version
        if len(self._pinned) > MAX_PINNED:
            self._pinned.popitem(last=False)

    async def _first_version(self, selector: Selector) -> Version:
        """Wait for an alias that was made moments ago, so that promote-then-ask just works."""
        assert selector.alias is not None, "only aliases become live"
        promised = await asyncio.to_thread(self._registry.resolve, selector)
        self._check_base(promised)
        key = (selector.name, selector.alias)
        deadline = time.monotonic() + FIRST_LIVE_SECONDS
        while time.monotonic() < deadline:
            if live := self._live.versions.get(key):
                return live
            if failure := self._live.failures.get(key):
                raise ModelNotLive(f"{promised.ref.label} cannot be served: {failure.sentence}")
            await asyncio.sleep(FIRST_LIVE_POLL_SECONDS)
        raise ModelStillLoads(
            f"{promised.ref.label} is still being loaded after {FIRST_LIVE_SECONDS:.0f} seconds. "
            "Try again."
        )

    def _check_base(self, version: Version) -> None:
        if not self.runs(version):
            raise BaseMismatch(
                f"{version.ref.label} was made for {version.base_id}; this server runs "
                f"{self._base.id}. Ask a server that runs {version.base_id}."
            )


def _selector(model: str, namespace: str) -> Selector:
    try:
        return Selector.parse(model, namespace)
    except InvalidName as error:
        raise AdapterNotFound(f"There is no model {model[:100]!r} here. {error.message}") from error
