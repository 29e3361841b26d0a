"""What the pairs of a comparison add up to: one term a unit, summed by the database.

A paired comparison is the mean of its differences, so every measure is one ratio Σy / Σx over
units. Who asks often says so in x, and counts as one unit all the same.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, func, literal, select

from serving.experiments.sequential import Sums
from serving.experiments.sums import columns_of_sums
from serving.shadow.tables import pairs


def one_if(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, 1), else_=0)


_answered = one_if(pairs.c.failed.is_(False))
_timed = and_(pairs.c.production_seconds > 0, pairs.c.candidate_seconds > 0)
_known = pairs.c.logprob.is_not(None)
_both_known = and_(_known, pairs.c.production_logprob.is_not(None))

# name → (numerator, denominator) of one pair; a pair without a denominator is not in the measure.
MEASURES: dict[str, tuple[ColumnElement[Any], ColumnElement[Any]]] = {
    "failed": (one_if(pairs.c.failed), literal(1)),
    "same": (one_if(pairs.c.same), _answered),
    "prefix": (pairs.c.prefix, _answered),
    "equal": (pairs.c.equal, _answered),
    "length": (pairs.c.candidate_tokens - pairs.c.production_tokens, _answered),
    "ended": (one_if(pairs.c.candidate_stopped) - one_if(pairs.c.production_stopped), _answered),
    "json": (
        one_if(pairs.c.candidate_json) - one_if(pairs.c.production_json),
        one_if(and_(pairs.c.json_expected, pairs.c.failed.is_(False))),
    ),
    "logprob": (pairs.c.logprob, case((_known, pairs.c.logprob_tokens), else_=0)),
    "logprob_difference": (
        pairs.c.logprob - pairs.c.production_logprob,
        case((_both_known, pairs.c.logprob_tokens), else_=0),
    ),
    "slower": (func.ln(pairs.c.candidate_seconds / pairs.c.production_seconds), one_if(_timed)),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The sums of one measure, and the least and the greatest mean of a unit."""

    sums: Sums
    least: float = 0.0
    most: float = 0.0


def measure_all(connection: Connection, comparison: str) -> dict[str, Measured]:
    """Return every measure by its name; zeros where no pair has it."""
    return {name: _measure(connection, comparison, *parts) for name, parts in MEASURES.items()}


def _measure(
    connection: Connection, comparison: str, y: ColumnElement[Any], x: ColumnElement[Any]
) -> Measured:
    counted = case((x > 0, y), else_=0.0)
    units = (
        select(func.sum(counted).label("y"), func.sum(x).label("x"))
        .where(pairs.c.comparison == comparison)
        .group_by(pairs.c.unit)
        .having(func.sum(x) > 0)
        .subquery()
    )
    mean = units.c.y / (1.0 * units.c.x)  # else SQLite would divide integers
    columns = [*columns_of_sums(units.c.y, units.c.x), func.min(mean), func.max(mean)]
    row = connection.execute(select(*columns)).one()
    count, *numbers = (value or 0 for value in row)
    *sums, least, most = map(float, numbers)
    return Measured(Sums(int(count), *sums), least, most)
