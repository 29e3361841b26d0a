"""The tables of shadows and replays, in a database of their own. They hold numbers and hashes."""

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

metadata = MetaData()

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("production", JSON, nullable=False),
    Column("candidate", JSON, nullable=False),
    Column("share", Float, nullable=False),
    Column("salt", String(32), nullable=False),
    Column("state", String(8), nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("ended_at", String(40)),
    Index("comparisons_of", "namespace", "name", "created_at"),
)

pairs = Table(
    "pairs",
    metadata,
    Column("comparison", String(32), ForeignKey("comparisons.id"), primary_key=True),
    Column("unit", String(32), primary_key=True),  # before the key: the sums go by unit
    Column("key", String(64), primary_key=True),
    Column("failed", Boolean, nullable=False),
    Column("same", Boolean, nullable=False),
    Column("prefix", Float, nullable=False),
    Column("equal", Float, nullable=False),
    Column("production_tokens", Integer, nullable=False),
    Column("candidate_tokens", Integer, nullable=False),
    Column("production_stopped", Boolean, nullable=False),
    Column("candidate_stopped", Boolean, nullable=False),
    Column("logprob", Float),
    Column("production_logprob", Float),
    Column("logprob_tokens", Integer, nullable=False),
    Column("logprob_bounded", Boolean, nullable=False),
    Column("json_expected", Boolean, nullable=False),
    Column("production_json", Boolean, nullable=False),
    Column("candidate_json", Boolean, nullable=False),
    Column("production_seconds", Float),
    Column("candidate_seconds", Float),
    sqlite_with_rowid=False,
)

# Requests that were chosen and made no pair, by why.
skipped = Table(
    "skipped",
    metadata,
    Column("comparison", String(32), ForeignKey("comparisons.id"), primary_key=True),
    Column("why", String(32), primary_key=True),
    Column("count", Integer, nullable=False),
    sqlite_with_rowid=False,
)

SCHEMA = Schema(metadata, {})
