"""The schema of a database: its tables, its version, and the steps from older versions.

A step is one version's change, in its own words and never through today's tables, which move on.
All missing steps run in one transaction, so a store is of the old schema or of the new one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sqlalchemy import Column, Connection, Integer, MetaData, Table, insert, inspect, select, update

if TYPE_CHECKING:
    from alembic.operations import Operations

Step: TypeAlias = "Callable[[Operations], None]"


@dataclass(frozen=True, slots=True)
class Schema:
    """Tables, with one more that holds the version; `steps` has one for each version after 1."""

    metadata: MetaData
    steps: Mapping[int, Step]

    @property
    def version(self) -> int:
        return max(self.steps, default=1)

    def found(self, connection: Connection) -> int:
        """Return the version of a database; 0 for one without tables."""
        if not inspect(connection).has_table(_version.name):
            return 0
        return connection.execute(select(_version.c.version)).scalar_one()

    def bring_up(self, connection: Connection) -> None:
        """Make the tables, or run the missing steps, in the caller's transaction."""
        found = self.found(connection)
        if found == 0:
            self.metadata.create_all(connection)
            _version.create(connection)
            connection.execute(insert(_version).values(version=self.version))
            return
        # A sixth of the start of every command, and few of them have anything to bring up.
        from alembic.migration import MigrationContext
        from alembic.operations import Operations

        operations = Operations(MigrationContext.configure(connection))
        for version in range(found + 1, self.version + 1):
            self.steps[version](operations)
            connection.execute(update(_version).values(version=version))


_version = Table("schema", MetaData(), Column("version", Integer, nullable=False))
