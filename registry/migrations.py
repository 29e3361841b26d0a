"""How a store of an older schema becomes one of today's: one step a version, all or nothing.

A step says what it changes in its own words, never through `registry.tables`: those move on.
"""

from collections.abc import Callable

from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Column, Connection, String, select, update

from registry.tables import schema


def _keys_expire_and_adapters_are_shared(op: Operations) -> None:
    op.add_column("keys", Column("expires_at", String(40)))
    op.create_table(
        "shares",
        Column("namespace", String(63), primary_key=True),
        Column("name", String(63), primary_key=True),
        Column("tenant", String(63), primary_key=True),
        Column("shared_at", String(40), nullable=False),
    )


# version → the step from the one before it
STEPS: dict[int, Callable[[Operations], None]] = {2: _keys_expire_and_adapters_are_shared}


def upgrade(connection: Connection) -> None:
    """Run the steps that are missing, in the caller's transaction."""
    found = connection.execute(select(schema.c.version)).scalar_one()
    operations = Operations(MigrationContext.configure(connection))
    for version in range(found + 1, max(STEPS) + 1):
        STEPS[version](operations)
        connection.execute(update(schema).values(version=version))
