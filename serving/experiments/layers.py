"""Layers: experiments of one layer share no unit, and some of its units are in none of them.

A unit has one place in a layer, from 0 to 1, whatever it asks. Each experiment of the layer has a
slice that nobody else has until it is stopped; the end of the layer is the holdout.
"""

import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from registry.database import now
from registry.errors import Conflict
from serving.experiments.codec import ExperimentNotFound, read_experiment
from serving.experiments.experiment import Slice
from serving.experiments.tables import experiments, layers

ROUNDING = 1e-9  # shares that people write do not add up to a hair's breadth


class LayerNotFound(ExperimentNotFound):
    code = "layer_not_found"


def no_layer(namespace: str, name: str) -> LayerNotFound:
    return LayerNotFound(
        f"There is no layer {namespace}/{name}.",
        command=f"Make it with: wardrobe experiment layer create {namespace}/{name}",
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """A way to share out the units of a tenant among its experiments."""

    namespace: str
    name: str
    salt: str
    holdout: float
    created_at: str
    taken: tuple[tuple[str, Slice], ...]  # experiment and its slice, in order of their place

    @property
    def free(self) -> list[tuple[float, float]]:
        """Return the gaps between the slices, from first to last."""
        gaps: list[tuple[float, float]] = []
        reached = 0.0
        for _, part in self.taken:
            gaps.append((reached, part.low))
            reached = part.high
        gaps.append((reached, 1 - self.holdout))
        return [(low, high) for low, high in gaps if high - low > ROUNDING]


def describe_layer(layer: Layer) -> dict[str, Any]:
    """Return it for JSON."""
    return {
        "object": "layer",
        "id": f"{layer.namespace}/{layer.name}",
        "holdout": layer.holdout,
        "taken": [
            {"experiment": experiment, "low": part.low, "high": part.high}
            for experiment, part in layer.taken
        ],
        "free": layer.free,
        "created_at": layer.created_at,
    }


def add_layer(connection: Connection, namespace: str, name: str, holdout: float) -> Layer:
    """Raises Conflict for a name that is taken."""
    query = select(layers).where(layers.c.namespace == namespace, layers.c.name == name)
    if connection.execute(query).first() is not None:
        raise Conflict(f"There is a layer {namespace}/{name} already. Its holdout never changes.")
    row = {"namespace": namespace, "name": name, "salt": secrets.token_hex(16)}
    connection.execute(insert(layers).values(**row, holdout=holdout, created_at=now()))
    return read_layer(connection, namespace, name)


def read_layer(connection: Connection, namespace: str, name: str) -> Layer:
    """Raises NotFound."""
    query = select(layers).where(layers.c.namespace == namespace, layers.c.name == name)
    row = connection.execute(query).first()
    if row is None:
        raise no_layer(namespace, name)
    query = select(experiments).where(
        experiments.c.namespace == namespace, experiments.c.state != "stopped"
    )
    open_ones = [read_experiment(found) for found in connection.execute(query)]
    taken = [(e.id, e.slice) for e in open_ones if e.slice and e.slice.layer == name]
    taken.sort(key=lambda pair: pair[1].low)
    return Layer(namespace, name, row.salt, row.holdout, row.created_at, tuple(taken))


def take_slice(connection: Connection, namespace: str, name: str, share: float) -> Slice:
    """Return the first gap of a layer that is wide enough. Raises NotFound, Conflict."""
    layer = read_layer(connection, namespace, name)
    for low, high in layer.free:
        if high - low >= share - ROUNDING:
            return Slice(name, layer.salt, low, min(low + share, high))
    widest = max((high - low for low, high in layer.free), default=0.0)
    holders = ", ".join(experiment for experiment, _ in layer.taken) or "the holdout"
    raise Conflict(
        f"The widest free part of the layer {namespace}/{name} is {widest:g}, and {share:g} is "
        f"asked for. It is held by {holders}. Ask for less, or stop one of them."
    )
