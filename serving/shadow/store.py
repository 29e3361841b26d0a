"""Shadows and replays on disk: what is compared, and the pairs so far."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.adapter import AdapterName
from registry.database import Store, now
from registry.errors import Conflict, NotFound
from serving.experiments.codec import read_arm, write_arm
from serving.experiments.experiment import Arm
from serving.shadow.comparison import Comparison
from serving.shadow.pair import Pair
from serving.shadow.sums import Measured, measure_all, one_if
from serving.shadow.tables import SCHEMA, comparisons, pairs, skipped


class ComparisonNotFound(NotFound):
    """No shadow or replay, or none that this caller may know of."""

    code = "comparison_not_found"


@dataclass(frozen=True, slots=True)
class Tally:
    """What a comparison adds up to."""

    pairs: int  # those of which the candidate failed included
    units: int
    bounded: int  # pairs whose first different token is not among the candidate's likely ones
    json_expected: int
    candidate_json: int  # among them
    skipped: dict[str, int]  # why → requests
    measures: dict[str, Measured]  # by their names in `sums`


class Comparisons(Store):
    """The shadows and replays of a home."""

    def __init__(self, home: Path) -> None:
        super().__init__(home, "shadow", SCHEMA)

    def start(
        self, name: AdapterName, production: Arm, candidate: Arm, share: float, actor: str
    ) -> Comparison:
        """Begin a shadow. Raises Conflict while the adapter has one."""
        made = Comparison(
            id=f"shd_{secrets.token_hex(6)}",
            kind="shadow",
            name=name,
            production=production,
            candidate=candidate,
            share=share,
            salt=secrets.token_hex(16),
            state="running",
            reason="",
            actor=actor,
            created_at=now(),
            ended_at=None,
        )
        running = select(comparisons.c.id).where(
            *_of(name), comparisons.c.kind == "shadow", comparisons.c.state == "running"
        )
        with self._database.write() as connection:
            if other := connection.execute(running).scalar():
                raise Conflict(f"{other} shadows {name} already. Stop it first.")
            connection.execute(insert(comparisons).values(**_row(made)))
        return made

    def begin_replay(self, made: Comparison) -> Comparison:
        """Write a replay down, or return it as it was begun before."""
        with self._database.write() as connection:
            connection.execute(upsert(comparisons).on_conflict_do_nothing().values(**_row(made)))
            return _get(connection, made.id)

    def stop(self, comparison: Comparison, reason: str) -> Comparison:
        """End it. One that was ended before keeps its first reason."""
        running = (comparisons.c.id == comparison.id) & (comparisons.c.state == "running")
        ended = update(comparisons).where(running)
        with self._database.write() as connection:
            connection.execute(ended.values(state="stopped", reason=reason, ended_at=now()))
            return _get(connection, comparison.id)

    def get(self, comparison_id: str) -> Comparison:
        """Raises ComparisonNotFound."""
        with self._database.read() as connection:
            return _get(connection, comparison_id)

    def latest_shadow(self, name: AdapterName) -> Comparison:
        """Return the shadow that runs on an adapter, else its last one. Raises as `get` does."""
        query = select(comparisons).where(*_of(name), comparisons.c.kind == "shadow")
        latest = query.order_by(comparisons.c.created_at.desc(), comparisons.c.id.desc())
        with self._database.read() as connection:
            row = connection.execute(latest.limit(1)).first()
        if row is None:
            raise ComparisonNotFound(
                f"{name} has no shadow.",
                command=f"Begin one: wardrobe shadow start {name} --candidate @vN",
            )
        return _comparison(row)

    def find(self, *, running: bool = False, namespace: str | None = None) -> list[Comparison]:
        """Return the shadows, oldest first."""
        query = select(comparisons).where(comparisons.c.kind == "shadow")
        if running:
            query = query.where(comparisons.c.state == "running")
        if namespace is not None:
            query = query.where(comparisons.c.namespace == namespace)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(comparisons.c.created_at, comparisons.c.id))
            return [_comparison(row) for row in rows]

    def record(self, found: Sequence[Pair], missed: Mapping[tuple[str, str], int]) -> None:
        """Write pairs, and how many requests made none: (comparison, why) → count. Durable."""
        with self._database.write() as connection:
            if found:
                rows = [asdict(pair) for pair in found]
                connection.execute(upsert(pairs).on_conflict_do_nothing(), rows)
            for (comparison, why), count in missed.items():
                more = upsert(skipped).values(comparison=comparison, why=why, count=count)
                same = ["comparison", "why"]
                total = {"count": skipped.c.count + count}
                connection.execute(more.on_conflict_do_update(index_elements=same, set_=total))

    def keys(self, comparison: Comparison) -> set[str]:
        """Return the keys that have a pair."""
        query = select(pairs.c.key).where(pairs.c.comparison == comparison.id)
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def size(self, comparison: Comparison) -> int:
        query = select(func.count()).where(pairs.c.comparison == comparison.id)
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def tally(self, comparison: Comparison) -> Tally:
        expected, good = pairs.c.json_expected, pairs.c.candidate_json
        of_it = pairs.c.comparison == comparison.id
        counts = select(
            func.count(),
            func.count(func.distinct(pairs.c.unit)),
            *(
                func.coalesce(func.sum(one_if(condition)), 0)
                for condition in (pairs.c.logprob_bounded, expected, expected & good)
            ),
        ).where(of_it)
        missed = select(skipped.c.why, skipped.c.count).where(skipped.c.comparison == comparison.id)
        with self._database.read() as connection:
            numbers = connection.execute(counts).one()
            why = {row[0]: row[1] for row in connection.execute(missed)}
            measures = measure_all(connection, comparison.id)
        pairs_, units, bounded, json_expected, candidate_json = map(int, numbers)
        return Tally(pairs_, units, bounded, json_expected, candidate_json, why, measures)


def _of(name: AdapterName) -> tuple[Any, Any]:
    return comparisons.c.namespace == name.namespace, comparisons.c.name == name.name


def _get(connection: Connection, comparison_id: str) -> Comparison:
    row = connection.execute(select(comparisons).where(comparisons.c.id == comparison_id)).first()
    if row is None:
        raise ComparisonNotFound(f"There is no comparison {comparison_id!r}.")
    return _comparison(row)


def _row(made: Comparison) -> dict[str, Any]:
    facts = asdict(made)
    name = facts.pop("name")
    arms = {"production": write_arm(made.production), "candidate": write_arm(made.candidate)}
    return {**facts, **name, **arms}


def _comparison(row: Row[Any]) -> Comparison:
    facts = dict(row._mapping)  # SQLAlchemy's documented name
    name = AdapterName(facts.pop("namespace"), facts.pop("name"))
    production, candidate = read_arm(facts.pop("production")), read_arm(facts.pop("candidate"))
    return Comparison(name=name, production=production, candidate=candidate, **facts)
