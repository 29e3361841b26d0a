"""Rows of API keys. What a secret is and who may do what is decided elsewhere."""

from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from registry.database import now
from registry.errors import Conflict, KeyNotFound
from registry.records import KeyRecord
from registry.tables import keys


def add_key(
    connection: Connection,
    key_id: str,
    secret_hash: str,
    tenant: str,
    scopes: tuple[str, ...],
    expires_at: str | None = None,
) -> KeyRecord:
    if find_key(connection, key_id):
        raise Conflict(f"There is already a key {key_id!r}. Make a new key id.")
    record = KeyRecord(key_id, secret_hash, tenant, tuple(scopes), now(), None, expires_at)
    connection.execute(
        insert(keys).values(
            key_id=key_id,
            secret_hash=secret_hash,
            tenant=tenant,
            scopes=list(scopes),
            created_at=record.created_at,
            expires_at=expires_at,
        )
    )
    return record


def find_key(connection: Connection, key_id: str) -> KeyRecord | None:
    """Return the key, revoked or not: the caller must look at `revoked_at`."""
    row = connection.execute(select(keys).where(keys.c.key_id == key_id)).first()
    return _key_of(row) if row else None


def get_key(connection: Connection, key_id: str) -> KeyRecord:
    """Return the key, revoked or not. Raises KeyNotFound."""
    record = find_key(connection, key_id)
    if record is None:
        raise KeyNotFound(f"There is no key {key_id!r} here.", command="See: wardrobe key list")
    return record


def list_keys(connection: Connection) -> list[KeyRecord]:
    rows = connection.execute(select(keys).order_by(keys.c.created_at, keys.c.key_id))
    return [_key_of(row) for row in rows]


def revoke_key(connection: Connection, key_id: str) -> KeyRecord:
    """Revoke a key. Idempotent: the first time counts. Raises KeyNotFound."""
    unrevoked = (keys.c.key_id == key_id) & keys.c.revoked_at.is_(None)
    connection.execute(update(keys).where(unrevoked).values(revoked_at=now()))
    return get_key(connection, key_id)


def expire_key(connection: Connection, key_id: str, moment: str) -> KeyRecord:
    """Let a key end at this time, or earlier where it already would. Raises KeyNotFound."""
    later = keys.c.expires_at.is_(None) | (keys.c.expires_at > moment)
    changed = update(keys).where((keys.c.key_id == key_id) & later).values(expires_at=moment)
    connection.execute(changed)
    return get_key(connection, key_id)


def _key_of(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        key_id=row.key_id,
        secret_hash=row.secret_hash,
        tenant=row.tenant,
        scopes=tuple(row.scopes),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        expires_at=row.expires_at,
    )
