"""What came of an answer: numbers that metrics count, and words that people write.

A request id names an answer that was exposed; of another tenant, it is as if it were not there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select
from sqlalchemy.dialects.sqlite import insert as upsert

from registry.adapter import AdapterName
from registry.database import now
from registry.errors import WardrobeError
from serving.experiments.codec import ExperimentNotFound, get_experiment
from serving.experiments.experiment import FEEDBACK_KINDS, REMARKS, Experiment
from serving.experiments.tables import experiments, exposures, feedback, feedback_log, remarks
from serving.tenants.keys import OPERATOR

MAX_REMARKS = 10  # of one kind about one answer: words, unlike values, do not replace each other
MAX_COMMENTS = 100  # that a report shows
PAGE = 1000  # demonstrations that are read at once


class FeedbackInvalid(WardrobeError):
    code = "feedback_invalid"


@dataclass(frozen=True, slots=True)
class Demonstration:
    """The answer that a person would have given, and to what."""

    seq: int
    request_id: str
    experiment: str
    version: str  # whose answer it is instead of
    unit: str  # who asked, as a hash
    messages: list[dict[str, str]]
    text: str
    at: str

    def row(self) -> dict[str, Any]:
        """Return it as recipes take rows, with where it is from. A unit's rows are one group."""
        made = {"how": "demonstration", "instead_of": self.version, "experiment": self.experiment}
        return {
            "messages": [*self.messages, {"role": "assistant", "content": self.text}],
            "group": self.unit,
            "made": {**made, "request_id": self.request_id, "at": self.at},
        }


def write_value(
    connection: Connection,
    request_id: str,
    metric: str,
    value: float,
    *,
    tenant: str | None,
    key: str | None,
) -> bool:
    """Record a value; the last one counts and all are kept. False: this key was seen before.

    `tenant` None is the operator. Raises NotFound, FeedbackInvalid.
    """
    experiment, _ = _answer_of(connection, request_id, tenant)
    _check_metric(experiment, metric, value)
    once = {"request_id": request_id, "metric": metric, "value": value, "at": now()}
    written = connection.execute(
        upsert(feedback_log).on_conflict_do_nothing().values(**once, key=key)
    )
    if written.rowcount == 0:
        return False
    latest = upsert(feedback).values(**once)
    same = [feedback.c.request_id, feedback.c.metric]
    replaced = {"value": latest.excluded.value, "at": latest.excluded.at}
    connection.execute(latest.on_conflict_do_update(index_elements=same, set_=replaced))
    return True


def write_remark(
    connection: Connection,
    request_id: str,
    kind: str,
    text: str,
    messages: Sequence[dict[str, str]],
    *,
    tenant: str | None,
    key: str | None,
) -> bool:
    """Record words about an answer. Raises as `write_value` does.

    They are read by the adapter's tenant, so one that it is only shared with is not to send any.
    """
    experiment, asked = _answer_of(connection, request_id, tenant)
    if asked not in (experiment.name.namespace, OPERATOR):
        raise FeedbackInvalid(
            f"Words about {experiment.name} would be read by {experiment.name.namespace}; they are "
            "taken from there only. Send values."
        )
    if (kind == "demonstration") != bool(messages) or (messages and messages[-1]["role"] != "user"):
        raise FeedbackInvalid(
            "A demonstration comes with the `messages` that it answers, the user's last; they are "
            "kept. A comment comes without."
        )
    query = select(remarks.c.key).where(remarks.c.request_id == request_id, remarks.c.kind == kind)
    keys = connection.execute(query).scalars().all()
    if key is not None and key in keys:
        return False
    if len(keys) >= MAX_REMARKS:
        raise FeedbackInvalid(f"{request_id} has {MAX_REMARKS} of kind {kind}, the most there are.")
    row = {"request_id": request_id, "kind": kind, "text": text, "messages": list(messages)}
    connection.execute(insert(remarks).values(**row, key=key, at=now()))
    return True


def read_demonstrations(
    connection: Connection, name: AdapterName, after: int
) -> list[Demonstration]:
    """Return the next PAGE for answers of an adapter's experiments, oldest first."""
    query = (
        select(remarks, exposures.c.experiment, exposures.c.arm, exposures.c.unit)
        .join(exposures, exposures.c.request_id == remarks.c.request_id)
        .join(experiments, experiments.c.id == exposures.c.experiment)
        .where(
            experiments.c.namespace == name.namespace,
            experiments.c.name == name.name,
            remarks.c.kind == "demonstration",
            remarks.c.seq > after,
        )
        .order_by(remarks.c.seq)
        .limit(PAGE)
    )
    rows = connection.execute(query).all()
    known = {of: get_experiment(connection, of) for of in {row.experiment for row in rows}}
    return [
        Demonstration(
            row.seq,
            row.request_id,
            row.experiment,
            known[row.experiment].arms[row.arm].version,
            row.unit,
            row.messages,
            row.text,
            row.at,
        )
        for row in rows
    ]


def comments_of(connection: Connection, experiment: Experiment) -> list[dict[str, Any]]:
    """Return the last MAX_COMMENTS about the answers of an experiment, newest first."""
    query = (
        select(remarks.c.at, remarks.c.text, remarks.c.request_id, exposures.c.arm)
        .join(exposures, exposures.c.request_id == remarks.c.request_id)
        .where(exposures.c.experiment == experiment.id, remarks.c.kind == "comment")
        .order_by(remarks.c.seq.desc())
        .limit(MAX_COMMENTS)
    )
    return [
        {
            "at": row.at,
            "arm": experiment.arms[row.arm].label,
            "request_id": row.request_id,
            "text": row.text,
        }
        for row in connection.execute(query)
    ]


def _answer_of(
    connection: Connection, request_id: str, tenant: str | None
) -> tuple[Experiment, str]:
    """Return the experiment of an answer, and the tenant that asked."""
    query = select(exposures).where(exposures.c.request_id == request_id)
    row = connection.execute(query).first()
    if row is None or (tenant is not None and row.tenant != tenant):
        raise ExperimentNotFound(f"No experiment knows an answer {request_id!r}.")
    return get_experiment(connection, row.experiment), row.tenant


def _check_metric(experiment: Experiment, name: str, value: float) -> None:
    taken = {m.name: m for m in experiment.metrics if m.kind in FEEDBACK_KINDS}
    if name not in taken:
        known = ", ".join([*taken, *REMARKS])
        raise ExperimentNotFound(f"{experiment.id} takes no feedback {name!r}. It takes: {known}.")
    if taken[name].kind == "binary" and value not in (0.0, 1.0):
        raise FeedbackInvalid(f"{name} is 0 or 1, and {value} was sent.")
