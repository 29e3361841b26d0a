"""The tables of limits and usage, in a database of their own: their writes never wait for a push.

Hours and periods are texts in UTC: 2026-11-25T13, 2026-11-25, 2026-11.
"""

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text

from registry.schema import Schema

metadata = MetaData()

limits = Table(
    "limits",
    metadata,
    Column("tenant", String(63), primary_key=True),  # * is everybody
    Column("name", String(127), primary_key=True),  # empty: all that the tenant asks for
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("concurrent", Integer),
    Column("tokens_per_day", Integer),
    Column("tokens_per_month", Integer),
    Column("set_at", String(40), nullable=False),
    sqlite_with_rowid=False,
)

limit_events = Table(
    "limit_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("tenant", String(63), nullable=False),
    Column("name", String(127), nullable=False),
    Column("before", JSON),  # NULL: there was none
    Column("after", JSON),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", String(40), nullable=False),
    sqlite_autoincrement=True,
)

# What was taken out of the buckets, as all servers of this home share them. `at` is the machine's
# monotonic clock.
buckets = Table(
    "buckets",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("name", String(127), primary_key=True),
    Column("requests", Float, nullable=False),
    Column("tokens", Float, nullable=False),
    Column("at", Float, nullable=False),
    sqlite_with_rowid=False,
)

# What the answers of one server hold now.
holdings = Table(
    "holdings",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("name", String(127), primary_key=True),
    Column("server", String(64), primary_key=True),
    Column("answers", Integer, nullable=False),
    Column("tokens", Integer, nullable=False),  # reserved, or used and not yet in `spent`
    sqlite_with_rowid=False,
)

# Those that run; `Presence` tells of one that was killed.
servers = Table(
    "servers",
    metadata,
    Column("server", String(64), primary_key=True),
    Column("alone", Boolean, nullable=False),  # it may know more of the buckets than their rows
    sqlite_with_rowid=False,
)

usage = Table(
    "usage",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("hour", String(13), primary_key=True),
    Column("name", String(127), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("version", Text, nullable=False),  # how the digest was called: acme/support@v7
    Column("answers", Integer, nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Index("usage_by_hour", "hour"),
    sqlite_with_rowid=False,
)

# The sums of `usage` that budgets are held against, written in the same transaction.
spent = Table(
    "spent",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("name", String(127), primary_key=True),
    Column("period", String(10), primary_key=True),
    Column("tokens", Integer, nullable=False),
    sqlite_with_rowid=False,
)

SCHEMA = Schema(metadata, {})
