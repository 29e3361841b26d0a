"""What a metric adds up to in each arm: one row a unit, summed by the database.

A unit without a denominator (no answer rated, none ended yet) is no unit of that ratio: it adds
nothing to the sums, and counting it would let two ratings pass for a hundred.
"""

from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, case, func, literal, select

from serving.experiments.experiment import Experiment, Metric
from serving.experiments.sequential import Sums
from serving.experiments.tables import exposures, feedback, outcomes


def sums_of(connection: Connection, experiment: Experiment, metric: Metric) -> dict[int, Sums]:
    """Return arm → sums; an arm without units has zeros."""
    source, y, x = _parts(experiment, metric)
    units = (
        select(exposures.c.arm, y.label("y"), x.label("x"))
        .select_from(source)
        .where(exposures.c.experiment == experiment.id)
        .group_by(exposures.c.arm, exposures.c.unit)
        .having(x > 0)
        .subquery()
    )
    query = select(units.c.arm, *columns_of_sums(units.c.y, units.c.x)).group_by(units.c.arm)
    rows = [tuple(row) for row in connection.execute(query)]
    found = {row[0]: Sums(row[1], *map(float, row[2:])) for row in rows}
    return {arm: found.get(arm, Sums(0)) for arm in range(len(experiment.arms))}


def columns_of_sums(y: ColumnElement[Any], x: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    """Return what `Sums` takes, in its order, over rows of one unit each."""
    return [func.count(), *map(func.sum, (y, y * y, x, x * x, x * y))]


def _parts(
    experiment: Experiment, metric: Metric
) -> tuple[FromClause, ColumnElement[Any], ColumnElement[Any]]:
    """Return the joined rows, and a unit's numerator and denominator over its answers."""
    if metric.kind in ("binary", "total", "average"):
        same = (feedback.c.request_id == exposures.c.request_id) & (
            feedback.c.metric == metric.name
        )
        source, value = exposures.outerjoin(feedback, same), feedback.c.value
        if metric.kind == "binary":
            answered = func.coalesce(func.max(case((value != 0, 1.0), else_=0.0)), 0.0)
            return source, answered, literal(1.0)
        total = func.coalesce(func.sum(value), 0.0)
        return source, total, literal(1.0) if metric.kind == "total" else func.count(value)
    same = outcomes.c.request_id == exposures.c.request_id
    source = exposures.outerjoin(outcomes, same)
    prompt, generated = experiment.policy.prices or (0.0, 0.0)
    value = {
        "errors": case((outcomes.c.failed, 1.0), else_=0.0),
        "latency": func.ln(outcomes.c.seconds),
        "tokens": outcomes.c.tokens,
        "cost": (outcomes.c.prompt_tokens * prompt + outcomes.c.tokens * generated) / 1e6,
        "malformed": case((outcomes.c.malformed, 1.0), else_=0.0),
    }[metric.kind]
    return source, func.coalesce(func.sum(value), 0.0), func.count(outcomes.c.request_id)
