"""The database behind the registry: SQLite by default, any SQLAlchemy URL otherwise."""

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import DatabaseError, OperationalError

from registry.errors import IntegrityError, StoreUnavailable
from registry.schema import Schema

BUSY_SECONDS = 5  # how long a writer waits for another process


class Database:
    """Transactions. Safe for threads; several processes may have one SQLite file open."""

    def __init__(self, url: str, schema: Schema, *, synchronous: str = "FULL") -> None:
        """Open it. With synchronous NORMAL what is committed outlives the process at once, and a
        power cut only after the next `checkpoint`.
        """
        self.engine = _engine(url, synchronous)
        self._schema = schema
        self._watch: sqlite3.Connection | None = None  # never writes: see `revision`

    def prepare(self) -> None:
        """Make the tables in a new database, upgrade an older one, refuse a newer one.

        The caller sees to it that one process at a time does this. Waits for no writer.
        """
        with self.read() as connection:
            found = self._schema.found(connection)
        if found > self._schema.version:
            raise StoreUnavailable(
                f"This store has schema {found}, made by a newer wardrobe; this one knows "
                f"{self._schema.version}. Upgrade wardrobe, or use another --home."
            )
        if found < self._schema.version:
            with self.write() as connection:
                self._schema.bring_up(connection)

    @contextmanager
    def read(self) -> Generator[Connection, None, None]:
        """Read one consistent snapshot."""
        with _explained(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Generator[Connection, None, None]:
        """Write in one transaction, durable when the block has ended; nothing on an exception.

        The write lock is taken at the start: two writers that both read first and then write
        would otherwise see one of them fail with "database is locked" at once.
        """
        with _explained(), self.engine.connect() as connection:
            connection = connection.execution_options(begin="BEGIN IMMEDIATE")
            with connection.begin():
                yield connection

    def revision(self) -> int | None:
        """Return a number that is another one after anybody has committed; None: not known now.

        It takes microseconds and waits for nobody, so whoever follows a database asks for it on
        the event loop, and reads only then. See https://sqlite.org/pragma.html#pragma_data_version
        """
        file = self.engine.url.database
        if self.engine.dialect.name != "sqlite" or not file or file == ":memory:":
            return None  # a second connection to memory would see a database of its own
        try:
            if self._watch is None:
                # What a connection commits itself does not change its own number.
                self._watch = sqlite3.connect(
                    file,
                    timeout=0,
                    isolation_level=None,
                    check_same_thread=False,
                )
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return None  # reading will say what is wrong

    def quick_check(self) -> list[str]:
        """Return what SQLite finds damaged in its file."""
        if self.engine.dialect.name != "sqlite":
            return []
        with self.read() as connection:
            lines = [str(row[0]) for row in connection.execute(text("PRAGMA quick_check"))]
        return [line for line in lines if line != "ok"]

    def checkpoint(self) -> None:
        """Sync to the disk what SQLite has committed. Waits for no reader and no writer."""
        with _explained(), self.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    def wipe_log(self) -> None:
        """Empty SQLite's write-ahead log into the file: what was deleted is then in neither.

        Does as much as other readers let it, and nothing where there is no such log.
        """
        if self.engine.dialect.name != "sqlite":
            return
        raw = self.engine.raw_connection()  # outside of any transaction, which it cannot be in
        try:
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
        finally:
            raw.close()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self.engine.dispose()


class Closing:
    """What has a database; at the end of a `with` it is closed."""

    _database: Database

    def revision(self) -> int | None:
        """Return a number that is another one after any write; None: not known. See `Database`."""
        return self._database.revision()

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Store(Closing):
    """What keeps a database of its own in the home: another one's writes never wait for it.

    Safe for threads and for several processes at once; close it after use.
    """

    def __init__(self, home: Path, name: str, schema: Schema, *, synchronous: str = "FULL") -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.path = home / f"{name}.sqlite"
        # Two processes that make the same database at once would disturb each other.
        with FileLock(home / f".{name}.lock"):
            self._database = Database(f"sqlite:///{self.path}", schema, synchronous=synchronous)
            self._database.prepare()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _engine(url: str, synchronous: str) -> Engine:
    is_sqlite = url.startswith("sqlite")
    options = {"timeout": BUSY_SECONDS} if is_sqlite else {}
    # A row may hold what somebody said, and an error with it would end up in the server's log.
    engine = create_engine(url, connect_args=options, hide_parameters=True)
    if not is_sqlite:
        return engine

    # The driver would start transactions by itself, and too late: SQLAlchemy's documented recipe.
    def on_connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    def on_begin(connection: Connection) -> None:
        begin = connection.get_execution_options().get("begin", "BEGIN")
        connection.exec_driver_sql(begin)

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


@contextmanager
def _explained() -> Generator[None, None, None]:
    """Turn the errors of the database into ours."""
    try:
        yield
    except OperationalError as error:
        raise StoreUnavailable(
            f"The database cannot be used now: {error.orig}. Free disk space, or try again when "
            "the other process has finished."
        ) from error
    except DatabaseError as error:
        raise IntegrityError(
            f"The database is damaged or was changed by hand: {error.orig}. Restore a backup."
        ) from error
