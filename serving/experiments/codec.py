"""How an experiment is written into its row, and read from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select

from registry.adapter import AdapterName
from registry.errors import NotFound
from serving.experiments.experiment import Arm, Experiment, Metric, Policy, Slice
from serving.experiments.tables import experiments


class ExperimentNotFound(NotFound):
    """No experiment, or none that this caller may know of."""

    code = "experiment_not_found"


def no_experiment(experiment_id: str) -> ExperimentNotFound:
    return ExperimentNotFound(
        f"There is no experiment {experiment_id!r}.", command="See: wardrobe experiment list"
    )


def get_experiment(connection: Connection, experiment_id: str) -> Experiment:
    query = select(experiments).where(experiments.c.id == experiment_id)
    row = connection.execute(query).first()
    if row is None:
        raise no_experiment(experiment_id)
    return read_experiment(row)


def write_design(
    arms: Sequence[Arm], metrics: Sequence[Metric], policy: Policy, part: Slice | None, salt: str
) -> dict[str, Any]:
    return {
        "arms": [write_arm(arm) for arm in arms],
        "metrics": [asdict(metric) for metric in metrics],
        "policy": asdict(policy),
        "slice": asdict(part) if part else None,
        "salt": salt,
    }


def read_experiment(row: Row[Any]) -> Experiment:
    design = row.design
    return Experiment(
        id=row.id,
        name=AdapterName(row.namespace, row.name),
        arms=tuple(read_arm(arm) for arm in design["arms"]),
        metrics=tuple(msgspec.convert(metric, Metric) for metric in design["metrics"]),
        policy=_policy(design),
        slice=msgspec.convert(design.get("slice"), Slice | None),
        salt=design["salt"],
        state=row.state,
        exposure=row.exposure,
        generation=row.generation,
        created_at=row.created_at,
        started_at=row.started_at,
        held_since=row.held_since,
        ended_at=row.ended_at,
    )


def write_arm(arm: Arm) -> dict[str, Any]:
    return {**asdict(arm), "name": str(arm.name) if arm.name else None}


def read_arm(value: Mapping[str, Any]) -> Arm:
    name = AdapterName.parse(value["name"]) if value["name"] else None
    return replace(msgspec.convert({**value, "name": None}, Arm), name=name)


def _policy(design: dict[str, Any]) -> Policy:
    """Rows of the first schema have three fields of it beside the others."""
    first = {name: design[name] for name in ("alpha", "on_win", "blind") if name in design}
    return msgspec.convert(design.get("policy", first), Policy)
