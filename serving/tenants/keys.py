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
from dataclasses import dataclass

from registry.errors import StoreUnavailable, WardrobeError
from registry.records import KeyRecord
from registry.store import Registry

OPERATOR = "operator"
INFER, READ, ADMIN = "infer", "read", "admin"
SCOPES = (INFER, READ, ADMIN)

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


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None  # None when the server runs without authentication

    def require(self, scope: str) -> None:
        if scope not in self.scopes:
            raise ScopeMissing(
                f"This key may not do that: it lacks the scope {scope!r}. "
                f"It has: {', '.join(sorted(self.scopes)) or 'none'}."
            )


ANYBODY = Principal(OPERATOR, frozenset(SCOPES))


def ensure_operator_key(registry: Registry) -> str | None:
    """Return a new operator key when the store has no valid one; None when it has."""
    valid = _valid_operator_keys(registry)
    return None if valid else _add_operator_key(registry)


def rotate_operator_key(registry: Registry) -> str:
    """Return a new operator key and revoke the ones before it."""
    old = _valid_operator_keys(registry)
    new = _add_operator_key(registry)
    for key in old:
        registry.revoke_key(key.key_id)
    return new


def _valid_operator_keys(registry: Registry) -> list[KeyRecord]:
    keys = registry.keys()
    return [key for key in keys if key.tenant == OPERATOR and key.revoked_at is None]


def _add_operator_key(registry: Registry) -> str:
    key_id, text = new_key()
    registry.add_key(key_id, hash_key(text), OPERATOR, SCOPES)
    return text


def new_key() -> tuple[str, str]:
    """Return (id, key text)."""
    key_id = secrets.token_hex(6)
    return key_id, f"wr_{key_id}_{secrets.token_hex(32)}"


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
        if record is None or record.revoked_at is not None or not same:
            raise InvalidKey(
                "This API key is not valid here. Send `Authorization: Bearer wr_…` with a key "
                "that was made on this server and has not been revoked."
            )
        return Principal(record.tenant, frozenset(record.scopes), record.key_id)

    async def _find(self, key_id: str) -> KeyRecord | None:
        now = time.monotonic()
        seen_at, known = self._cache.get(key_id, (0.0, None))
        if known and now - seen_at < FRESH_SECONDS:
            return known
        try:
            record = await asyncio.to_thread(self._registry.find_key, key_id)
        except StoreUnavailable:
            if known and now - seen_at < STALE_SECONDS:
                return known
            raise
        self._cache.pop(key_id, None)
        if record is not None:
            self._cache[key_id] = (now, record)
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return record
