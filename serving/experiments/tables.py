"""The tables of experiments, in a database of their own: their writes never wait for a push."""

from typing import TYPE_CHECKING

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from registry.schema import Schema

if TYPE_CHECKING:
    from alembic.operations import Operations

metadata = MetaData()

experiments = Table(
    "experiments",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("namespace", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("design", JSON, nullable=False),  # arms, metrics, policy, slice, salt
    Column("state", String(16), nullable=False),
    Column("exposure", Float, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("started_at", String(40)),
    Column("held_since", String(40)),
    Column("ended_at", String(40)),
    Index("experiments_by_state", "state"),
)

decisions = Table(
    "decisions",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("experiment", String(32), ForeignKey("experiments.id"), nullable=False),
    Column("at", String(40), nullable=False),
    Column("action", String(24), nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("numbers", JSON, nullable=False),  # that justified it
    Index("decisions_of", "experiment", "seq"),
    sqlite_autoincrement=True,
)

layers = Table(
    "layers",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("salt", String(32), nullable=False),
    Column("holdout", Float, nullable=False),  # share of the units that no experiment gets
    Column("created_at", String(40), nullable=False),
)

# What became of telling the webhook; a decision without a row waits, unless it is older than all.
deliveries = Table(
    "deliveries",
    metadata,
    Column("decision", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),  # sending, delivered, given up, before
    Column("attempts", Integer, nullable=False),
    Column("error", Text, nullable=False),
    Column("until", Float, nullable=False),  # Unix time: whoever sends has it that long
    Column("at", String(40), nullable=False),
)

# One row an answer, written before its first token leaves.
exposures = Table(
    "exposures",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("experiment", String(32), ForeignKey("experiments.id"), nullable=False),
    Column("arm", Integer, nullable=False),
    Column("unit", String(32), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("keyed", Boolean, nullable=False),  # False: the unit is the request itself
    Column("at", String(40), nullable=False),
    # Has all that the sums read of an exposure: the table itself is not touched.
    Index("exposures_of", "experiment", "arm", "unit", "request_id"),
)

outcomes = Table(
    "outcomes",
    metadata,
    Column("request_id", String(64), ForeignKey("exposures.request_id"), primary_key=True),
    Column("failed", Boolean, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False, server_default="0"),
    Column("malformed", Boolean, nullable=False, server_default="0"),  # it should be JSON
    sqlite_with_rowid=False,  # found by its key in one step
)

# The value that counts now; every value ever sent is in `feedback_log`.
feedback = Table(
    "feedback",
    metadata,
    Column("request_id", String(64), ForeignKey("exposures.request_id"), primary_key=True),
    Column("metric", String(63), primary_key=True),
    Column("value", Float, nullable=False),
    Column("at", String(40), nullable=False),
    sqlite_with_rowid=False,
)

feedback_log = Table(
    "feedback_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(64), nullable=False),
    Column("metric", String(63), nullable=False),
    Column("value", Float, nullable=False),
    Column("key", String(128)),  # the client's idempotency key, for each metric of an answer
    Column("at", String(40), nullable=False),
    Index("feedback_once", "request_id", "metric", "key", unique=True),
    sqlite_autoincrement=True,
)

# What people say of an answer in words. Kept whole, and by its request only.
remarks = Table(
    "remarks",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(64), ForeignKey("exposures.request_id"), nullable=False),
    Column("kind", String(16), nullable=False),  # comment, demonstration
    Column("text", Text, nullable=False),
    Column("messages", JSON, nullable=False),  # of a demonstration: what was asked
    Column("key", String(128)),
    Column("at", String(40), nullable=False),
    Index("remark_once", "request_id", "kind", "key", unique=True),
    sqlite_autoincrement=True,
)


def _ramps_layers_words_and_webhooks(op: "Operations") -> None:
    op.add_column("experiments", Column("held_since", String(40)))
    number, flag = {"nullable": False, "server_default": "0"}, Boolean()
    op.add_column("outcomes", Column("prompt_tokens", Integer(), **number))
    op.add_column("outcomes", Column("malformed", flag, **number))
    op.create_table(
        "layers",
        Column("namespace", String(63), primary_key=True),
        Column("name", String(63), primary_key=True),
        Column("salt", String(32), nullable=False),
        Column("holdout", Float, nullable=False),
        Column("created_at", String(40), nullable=False),
    )
    op.create_table(
        "deliveries",
        Column("decision", Integer, primary_key=True, autoincrement=False),
        Column("state", String(16), nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error", Text, nullable=False),
        Column("until", Float, nullable=False),
        Column("at", String(40), nullable=False),
    )
    op.create_table(
        "remarks",
        Column("seq", Integer, primary_key=True, autoincrement=True),
        Column("request_id", String(64), ForeignKey("exposures.request_id"), nullable=False),
        Column("kind", String(16), nullable=False),
        Column("text", Text, nullable=False),
        Column("messages", JSON, nullable=False),
        Column("key", String(128)),
        Column("at", String(40), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("remark_once", "remarks", ["request_id", "kind", "key"], unique=True)


SCHEMA = Schema(metadata, {2: _ramps_layers_words_and_webhooks})
