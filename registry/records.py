"""Facts that the store hands out. All times are ISO 8601 in UTC."""

from dataclasses import dataclass
from typing import Any, Literal

from registry.adapter import BASE, AdapterName, Selector, Version

Action = Literal["push", "promote", "rollback"]
EndpointAction = Literal["create", "change", "delete"]
RolloutState = Literal["warming", "live", "failed"]


@dataclass(frozen=True, slots=True)
class Push:
    """The answer to a push."""

    version: Version
    created: bool  # False when the same content was already there under this name
    warnings: tuple[tuple[str, str], ...] = ()  # (code, sentence)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log of everything that changed. `seq` only grows, and has no reader gaps."""

    seq: int
    action: Action
    name: AdapterName
    alias: str | None  # None for a push
    number: int  # the version pushed, or the one the alias points to afterwards
    digest: str
    previous: int | None  # the version the alias pointed to before
    generation: int | None  # of the alias, after the move
    forced: bool  # promoted although its gate had failed
    actor: str
    reason: str
    at: str


@dataclass(frozen=True, slots=True)
class Alias:
    """Where an alias points now."""

    name: AdapterName
    alias: str
    number: int
    digest: str
    generation: int  # grows by one with every move; compare-and-set works on it
    event_seq: int  # of the move that put it there
    moved_at: str


@dataclass(frozen=True, slots=True)
class AliasMove:
    """The answer to a promote or rollback."""

    alias: Alias
    previous: int | None  # version number before the move
    moved: bool  # False when a promote found the alias already there


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """A server that follows this store."""

    server_id: str
    url: str
    seen_at: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one server last said about one alias."""

    server_id: str
    url: str
    name: AdapterName
    alias: str
    event_seq: int
    number: int
    digest: str
    state: RolloutState
    message: str
    seconds: float  # from the start of warming to now
    at: str


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One API key. The secret itself is never stored."""

    key_id: str
    secret_hash: str
    tenant: str
    scopes: tuple[str, ...]
    created_at: str
    revoked_at: str | None
    expires_at: str | None = None

    def valid_at(self, moment: str) -> bool:
        """Tell whether the key opens anything at this time; ISO 8601 in UTC sorts as text."""
        return self.revoked_at is None and (self.expires_at is None or moment < self.expires_at)


@dataclass(frozen=True, slots=True)
class Share:
    """An adapter that another tenant may use. Only its owner changes it."""

    name: AdapterName
    tenant: str
    shared_at: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A stable name that clients ask for, in front of what may change."""

    name: AdapterName  # written like an adapter's; the namespace is the tenant
    target: Selector | None  # None is the bare base
    defaults: dict[str, Any]  # field of a request → value, where the request leaves it out
    generation: int  # grows by one with every change; compare-and-set works on it
    created_at: str
    changed_at: str

    @property
    def model(self) -> str:
        """The target as a client would write it."""
        return str(self.target) if self.target else BASE

    def facts(self) -> dict[str, Any]:
        """Return it as it is shown."""
        return {
            "id": str(self.name),
            "model": self.model,
            "defaults": self.defaults,
            "generation": self.generation,
            "created_at": self.created_at,
            "changed_at": self.changed_at,
        }


@dataclass(frozen=True, slots=True)
class EndpointEvent:
    """One line of the log of endpoints: what one was after the action, or before its end."""

    seq: int
    action: EndpointAction
    name: AdapterName
    model: str
    defaults: dict[str, Any]
    generation: int
    actor: str
    reason: str
    at: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a full check of the store found."""

    versions: int
    blobs: int
    bytes: int
    problems: tuple[str, ...]  # sentences; empty when the store is sound
    orphans: tuple[str, ...]  # blobs that no version names: harmless, a push died before its row

    @property
    def ok(self) -> bool:
        return not self.problems
