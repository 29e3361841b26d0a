"""What changed from one schema of the registry's database to the next."""

from typing import TYPE_CHECKING

from sqlalchemy import JSON, Column, Integer, String, Text

from registry import tables
from registry.schema import Schema

if TYPE_CHECKING:
    from alembic.operations import Operations


def _keys_expire_and_adapters_are_shared(op: "Operations") -> None:
    op.add_column("keys", Column("expires_at", String(40)))
    op.create_table(
        "shares",
        Column("namespace", String(63), primary_key=True),
        Column("name", String(63), primary_key=True),
        Column("tenant", String(63), primary_key=True),
        Column("shared_at", String(40), nullable=False),
    )


def _endpoints(op: "Operations") -> None:
    op.create_table(
        "endpoints",
        Column("namespace", String(63), primary_key=True),
        Column("name", String(63), primary_key=True),
        Column("target", String(300)),
        Column("defaults", JSON, nullable=False),
        Column("generation", Integer, nullable=False),
        Column("created_at", String(40), nullable=False),
        Column("changed_at", String(40), nullable=False),
    )
    op.create_table(
        "endpoint_events",
        Column("seq", Integer, primary_key=True, autoincrement=True),
        Column("action", String(16), nullable=False),
        Column("namespace", String(63), nullable=False),
        Column("name", String(63), nullable=False),
        Column("target", String(300)),
        Column("defaults", JSON, nullable=False),
        Column("generation", Integer, nullable=False),
        Column("actor", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("at", String(40), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("endpoint_events_by_name", "endpoint_events", ["namespace", "name", "seq"])


SCHEMA = Schema(tables.metadata, {2: _keys_expire_and_adapters_are_shared, 3: _endpoints})
