"""What reading costs as a registry grows, counted in instructions of SQLite's virtual machine."""

import sqlite3
from collections.abc import Callable
from typing import Any

from sqlalchemy import event, insert

from registry import tables
from registry.adapter import Selector
from registry.database import now
from registry.store import Registry


def seed_adapters(registry: Registry, numbers: range) -> None:
    row = {
        "namespace": "acme", "number": 1, "kind": "lora", "base_id": "b", "base_fingerprint": "",
        "rank": 8, "size_bytes": 1, "created_at": now(), "files": {}, "system_prompt": "",
        "card": {"metrics": {"accuracy": 0.9}},
    }  # fmt: skip
    pointer = {"namespace": "acme", "alias": "production", "number": 1, "depth": 1}
    moved = {"generation": 1, "event_seq": 1, "moved_at": now()}
    with registry._database.write() as connection:  # pyright: ignore[reportPrivateUsage] - 10,000 pushes would take minutes
        named = [(f"adapter-{i}", f"{i:064x}") for i in numbers]
        versions = [row | {"name": name, "digest": digest} for name, digest in named]
        connection.execute(insert(tables.versions), versions)
        aliases = [pointer | moved | {"name": name} for name, _ in named]
        connection.execute(insert(tables.aliases), aliases)


def instructions(registry: Registry, read: Callable[[], object]) -> int:
    """Return how many SQLite executes for what is read."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    def watch(connection: sqlite3.Connection, *_: Any) -> None:
        connection.set_progress_handler(tick, 1)

    engine = registry._database.engine  # pyright: ignore[reportPrivateUsage] - as above
    event.listen(engine, "checkout", watch)
    try:
        read()
    finally:
        event.remove(engine, "checkout", watch)
        with engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert isinstance(raw, sqlite3.Connection)
            raw.set_progress_handler(None, 0)
    return count


def test_resolving_costs_the_same_among_10_000_adapters_as_among_100(registry: Registry) -> None:
    def resolve_some() -> None:
        for i in range(0, 100, 7):
            assert registry.resolve(Selector.parse(f"acme/adapter-{i}")).number == 1

    def read_all() -> None:
        assert len(registry.newest()) == len(registry.all_aliases())

    seed_adapters(registry, range(100))
    few, few_of_all = instructions(registry, resolve_some), instructions(registry, read_all)
    seed_adapters(registry, range(100, 10_000))
    many, all_of_them = instructions(registry, resolve_some), instructions(registry, read_all)
    assert len(registry.newest()) == 10_000
    assert 0 < many < 1.1 * few
    assert all_of_them < 110 * few_of_all, "100 times as many rows"
