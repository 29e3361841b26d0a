"""The tables of the request log, in a database of its own: no other write ever waits for it."""

from sqlalchemy import JSON, Column, Float, Index, Integer, MetaData, String, Table, Text

from registry.schema import Schema

metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),  # the order of the ends
    Column("request_id", String(64), nullable=False, unique=True),
    Column("at", String(40), nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("method", String(16), nullable=False),
    Column("route", Text, nullable=False),
    Column("endpoint", String(63), nullable=False),
    Column("adapter", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("experiment", String(32), nullable=False),
    Column("arm", String(8), nullable=False),
    Column("status", Integer, nullable=False),
    Column("outcome", String(64), nullable=False),
    Column("finish", Text, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("first_token_ms", Float),
    Column("ms", Float, nullable=False),
    Index("requests_of", "tenant", "seq"),
    Index("requests_by_age", "at"),
    sqlite_autoincrement=True,
)

contents = Table(
    "contents",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("prompt", JSON, nullable=False),
    Column("answers", JSON, nullable=False),
)

settings = Table(
    "settings",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("sample", Float, nullable=False),
    Column("patterns", JSON, nullable=False),
    Column("keep_days", Integer, nullable=False),
)

SCHEMA = Schema(metadata, {})
