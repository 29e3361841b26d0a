"""API keys: `wr_<id>_<secret>`. The id finds the record, the secret proves it.

The secret has 256 random bits, so a plain SHA-256 of the key is as good as a slow hash: there is
nothing to guess. Only the hash is stored; the key itself is shown once, when it is made.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from registry.adapter import DEFAULT_NAMESPACE, check_tenant
from registry.database import now
from registry.errors import KeyNotFound, NotFound, StoreUnavailable, WardrobeError
from registry.records import KeyRecord
from registry.store import Registry

OPERATOR = "operator"  # the tenant that owns no namespace and sees all of them
INFER, FEEDBACK, READ = "infer", "feedback", "read"
PUSH, PROMOTE, EXPERIMENTS, ADMIN = "push", "promote", "experiments", "admin"
LOGS = "logs"
SCOPES = (INFER, FEEDBACK, READ, LOGS, PUSH, PROMOTE, EXPERIMENTS, ADMIN)

_KEY = re.compile(r"wr_([0-9a-f]{12})_[0-9a-f]{64}")
_NO_RECORD_HASH = "0" * 64

FRESH_SECONDS = 1.0  # a revoked key works no longer than this
STALE_SECONDS = 60.0  # how long a known key is good while the database cannot be read
MAX_CACHED = 4096


class InvalidKey(WardrobeError):
    """No key, a key that cannot be one, an unknown or a revoked one: one and the same answer."""

    code = "invalid_api_key"


class ScopeMissing(WardrobeError):
    code = "insufficient_scope"


class TenantNotFound(NotFound):
    """An address of a tenant that the key is not of, whether there is such a tenant or not."""

    code = "tenant_not_found"


class ScopeUnknown(WardrobeError):
    code = "unknown_scope"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None  # None when the server runs without authentication

    @property
    def is_operator(self) -> bool:
        return self.tenant == OPERATOR

    @property
    def namespace(self) -> str:
        """The namespace of names that are written without one."""
        return DEFAULT_NAMESPACE if self.is_operator else self.tenant

    def require(self, scope: str) -> None:
        if scope not in self.scopes:
            raise ScopeMissing(
                f"This key may not do that: it lacks the scope {scope!r}. "
                f"It has: {', '.join(sorted(self.scopes)) or 'none'}."
            )

    def require_tenant(self, tenant: str) -> None:
        if tenant != self.tenant:
            raise no_tenant(tenant)

    def require_operator(self) -> None:
        if not self.is_operator:
            raise ScopeMissing(
                f"This tells about every tenant: it is for the operator's keys, not for those of "
                f"{self.tenant!r}."
            )


def no_tenant(name: str) -> TenantNotFound:
    return TenantNotFound(f"There is no tenant {name[:63]!r} here.")


ANYBODY = Principal(OPERATOR, frozenset(SCOPES))


def ensure_operator_key(registry: Registry) -> str | None:
    """Return a new operator key when the store has no valid one; None when it has."""
    valid = _valid_operator_keys(registry)
    return None if valid else add_key(registry, OPERATOR, SCOPES)


def rotate_operator_key(registry: Registry) -> str:
    """Return a new operator key with every scope and revoke the ones before it."""
    old = _valid_operator_keys(registry)
    new = add_key(registry, OPERATOR, SCOPES)
    for key in old:
        registry.revoke_key(key.key_id)
    return new


def _valid_operator_keys(registry: Registry) -> list[KeyRecord]:
    """Return the operator's keys that may do everything, and not its narrower ones."""
    keys, moment = registry.keys(), now()
    return [k for k in keys if k.tenant == OPERATOR and ADMIN in k.scopes and k.valid_at(moment)]


def add_key(
    registry: Registry,
    tenant: str,
    scopes: Sequence[str],
    lifetime: timedelta | None = None,
    *,
    key_id: str | None = None,
) -> str:
    """Make a key for a tenant and return its text, which is shown only now.

    `key_id` is 12 hex digits of the maker's choice: who sends a wish again cannot get two keys.
    Raises InvalidName for what cannot be a tenant, ScopeUnknown for what is no scope, and Conflict
    for an id that is taken.
    """
    check_tenant(tenant)
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise ScopeUnknown(
            f"{', '.join(map(repr, unknown)) or 'An empty list'} is no scope. "
            f"A key needs one or more of: {', '.join(SCOPES)}."
        )
    key_id, text = new_key(key_id)
    ordered = tuple(scope for scope in SCOPES if scope in scopes)
    expires_at = _after(lifetime) if lifetime is not None else None
    registry.add_key(key_id, hash_key(text), tenant, ordered, expires_at)
    return text


def rotate_key(registry: Registry, key_id: str, grace: timedelta) -> str:
    """Return a new key like this one, which goes on working for `grace`.

    The new one lives as long as the old one was to live. Raises KeyNotFound for a key that is
    unknown or has ended: what was revoked must not come back.
    """
    old = registry.find_key(key_id)
    if old is None or not old.valid_at(now()):
        raise KeyNotFound(f"There is no valid key {key_id!r}.", command="See: wardrobe key list")
    new = add_key(registry, old.tenant, old.scopes, _lifetime(old))
    registry.expire_key(key_id, _after(grace))
    return new


def _lifetime(key: KeyRecord) -> timedelta | None:
    if key.expires_at is None:
        return None
    return datetime.fromisoformat(key.expires_at) - datetime.fromisoformat(key.created_at)


def _after(lifetime: timedelta) -> str:
    """Return the moment that is so far from now, as the store writes it."""
    return (datetime.now(UTC) + lifetime).isoformat(timespec="milliseconds")


def new_key(key_id: str | None = None) -> tuple[str, str]:
    """Return (id, key text)."""
    key_id = key_id or secrets.token_hex(6)
    return key_id, f"wr_{key_id}_{secrets.token_hex(32)}"


def id_of(text: str) -> str:
    """Return the public part of a key."""
    return text.split("_")[1]


def describe(key: KeyRecord) -> dict[str, object]:
    """Return what may be shown of a key: everything but the hash."""
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "valid": key.valid_at(now()),
    }


def hash_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class KeyRing:
    """Checks keys against the registry, at most once a second for each key."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._cache: OrderedDict[str, tuple[float, KeyRecord]] = OrderedDict()

    async def check(self, text: str) -> Principal:
        """Return who holds this key. Raises InvalidKey, or StoreUnavailable for an unseen key."""
        match = _KEY.fullmatch(text)
        record = await self._find(match[1]) if match else None
        expected = record.secret_hash if record else _NO_RECORD_HASH
        # Always compared, so that an unknown id takes as long as a wrong secret.
        same = hmac.compare_digest(expected, hash_key(text))
        if record is None or not record.valid_at(now()) or not same:
            raise InvalidKey(
                "This API key is not valid here. Send `Authorization: Bearer wr_…` with a key "
                "that was made on this server and has neither been revoked nor expired."
            )
        return Principal(record.tenant, frozenset(record.scopes), record.key_id)

    async def _find(self, key_id: str) -> KeyRecord | None:
        moment = time.monotonic()
        seen_at, known = self._cache.get(key_id, (0.0, None))
        if known and moment - seen_at < FRESH_SECONDS:
            return known
        try:
            record = await asyncio.to_thread(self._registry.find_key, key_id)
        except StoreUnavailable:
            if known and moment - seen_at < STALE_SECONDS:
                return known
            raise
        self._cache.pop(key_id, None)
        if record is not None:
            self._cache[key_id] = (moment, record)
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return record
