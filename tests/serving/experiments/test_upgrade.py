"""Experiments that an older wardrobe made go on where they were."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import inspect

from registry.database import Database
from serving.experiments.experiment import Policy
from serving.experiments.moves import move
from serving.experiments.store import Experiments
from serving.experiments.tables import SCHEMA
from tests.serving.experiments.stored import expose, started


def make_old(home: Path) -> None:
    """Turn the store back into what schema 1 was."""
    with closing(sqlite3.connect(home / "experiments.sqlite")) as database:
        for table, column in (
            ("experiments", "held_since"),
            ("outcomes", "prompt_tokens"),
            ("outcomes", "malformed"),
        ):
            database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        for table in ("layers", "deliveries", "remarks"):
            database.execute(f"DROP TABLE {table}")
        rows = database.execute("SELECT id, design FROM experiments").fetchall()
        for experiment, text in rows:
            design = json.loads(text)
            policy, _ = design.pop("policy"), design.pop("slice")
            first = {name: policy[name] for name in ("alpha", "on_win", "blind")}
            new = (json.dumps(design | first), experiment)
            database.execute("UPDATE experiments SET design = ? WHERE id = ?", new)
        database.execute("UPDATE schema SET version = 1")
        database.commit()


def shape(home: Path) -> dict[str, list[tuple[str, str, bool]]]:
    database = Database(f"sqlite:///{home / 'experiments.sqlite'}", SCHEMA)
    found = inspect(database.engine)
    columns = {
        name: sorted(
            (c["name"], str(c["type"]), bool(c["nullable"])) for c in found.get_columns(name)
        )
        for name in found.get_table_names()
    }
    database.close()
    return columns


def test_an_old_store_becomes_like_a_new_one_and_its_experiment_runs_on(tmp_path: Path) -> None:
    with Experiments(tmp_path / "old") as store:
        before = started(store, alpha=0.01, on_win="promote")
        expose(store, before, 0, "u", answers=2)
    make_old(tmp_path / "old")
    with Experiments(tmp_path / "old") as store:
        after = store.get(before.id)
        assert after.policy == Policy(alpha=0.01, on_win="promote")
        assert (after.slice, after.held_since, after.salt) == (None, None, before.salt)
        assert store.counts(after)[0].answers == 2
        assert store.coverage(after)[0].unended == 0
        assert move(store, after, "ramp", exposure=1.0, actor="t", reason="x").held_since
    with Experiments(tmp_path / "new"):
        assert shape(tmp_path / "new") == shape(tmp_path / "old")
