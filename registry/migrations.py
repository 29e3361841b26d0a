"""What changed from one schema of the registry's database to the next."""

from alembic.operations import Operations
from sqlalchemy import Column, String

from registry import tables
from registry.schema import Schema


def _keys_expire_and_adapters_are_shared(op: Operations) -> None:
    op.add_column("keys", Column("expires_at", String(40)))
    op.create_table(
        "shares",
        Column("namespace", String(63), primary_key=True),
        Column("name", String(63), primary_key=True),
        Column("tenant", String(63), primary_key=True),
        Column("shared_at", String(40), nullable=False),
    )


SCHEMA = Schema(tables.metadata, {2: _keys_expire_and_adapters_are_shared})
