"""A store that an older wardrobe made is upgraded once, whole, and keeps what it held."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.operations import Operations
from sqlalchemy import inspect

from registry.adapter import AdapterName
from registry.base import Bases
from registry.database import Database
from registry.errors import StoreUnavailable
from registry.migrations import SCHEMA
from registry.schema import Schema
from registry.store import Registry

Adapter = Callable[..., Path]
NAME = AdapterName.parse("acme/support")


def make_old(home: Path) -> None:
    """Turn a store back into what schema 1 was."""
    with sqlite3.connect(home / "registry.sqlite") as database:
        database.execute("ALTER TABLE keys DROP COLUMN expires_at")
        for table in ("shares", "endpoints", "endpoint_events"):
            database.execute(f"DROP TABLE {table}")
        database.execute("UPDATE schema SET version = 1")
    database.close()


def columns(url: str) -> dict[str, list[tuple[str, str, bool]]]:
    database = Database(url, SCHEMA)
    found = inspect(database.engine)
    shape = {
        name: [(c["name"], str(c["type"]), bool(c["nullable"])) for c in found.get_columns(name)]
        for name in found.get_table_names()
    }
    database.close()
    return shape


def test_every_schema_has_its_step() -> None:
    assert sorted(SCHEMA.steps) == list(range(2, SCHEMA.version + 1))


def test_an_old_store_becomes_like_a_new_one(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    pushed = registry.push(adapter(), NAME, actor="test").version
    registry.add_key("abc", "hash", "acme", ("infer",))
    make_old(registry.home)
    with Registry.open(registry.home, registry.bases) as upgraded:
        assert upgraded.versions(NAME) == [pushed]
        kept = upgraded.find_key("abc")
        assert kept is not None
        assert kept.expires_at is None
        assert upgraded.share(NAME, "beta").tenant == "beta"
    with Registry.open(tmp_path / "fresh", Bases(tmp_path / "bases")) as fresh:
        new = columns(f"sqlite:///{fresh.home / 'registry.sqlite'}")
    assert columns(f"sqlite:///{registry.home / 'registry.sqlite'}") == new


def test_an_upgrade_that_fails_leaves_the_old_store(registry: Registry) -> None:
    make_old(registry.home)

    def dies(op: Operations) -> None:
        for step in SCHEMA.steps.values():
            step(op)
        raise RuntimeError("power cut")

    url = f"sqlite:///{registry.home / 'registry.sqlite'}"
    database = Database(url, Schema(SCHEMA.metadata, {2: dies}))
    with pytest.raises(RuntimeError):
        database.prepare()
    database.close()
    assert "shares" not in columns(url)
    with Registry.open(registry.home, registry.bases) as upgraded:
        assert upgraded.shares() == []


def test_a_newer_store_is_left_alone(registry: Registry) -> None:
    with sqlite3.connect(registry.home / "registry.sqlite") as database:
        database.execute("UPDATE schema SET version = 99")
    database.close()
    with pytest.raises(StoreUnavailable, match="schema 99"):
        Registry.open(registry.home, registry.bases)
