"""The tables of the registry. Times are ISO 8601 texts in UTC, except where they are compared."""

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

versions = Table(
    "versions",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("base_id", String(200), nullable=False),
    Column("base_fingerprint", String(256), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("files", JSON, nullable=False),  # name → sha256
    Column("system_prompt", Text, nullable=False),
    Column("card", JSON, nullable=False),
    Index("versions_by_digest", "namespace", "name", "digest", unique=True),
    Index("versions_by_content", "digest"),
)

# The stack of an alias: promote puts a row on top, rollback takes it away.
alias_stack = Table(
    "alias_stack",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("alias", String(63), primary_key=True),
    Column("depth", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    ForeignKeyConstraint(
        ["namespace", "name", "number"],
        ["versions.namespace", "versions.name", "versions.number"],
    ),
)

aliases = Table(
    "aliases",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("alias", String(63), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("depth", Integer, nullable=False),  # of the row on top of its stack
    Column("generation", Integer, nullable=False),
    Column("event_seq", Integer, nullable=False),
    Column("moved_at", String(40), nullable=False),
    ForeignKeyConstraint(
        ["namespace", "name", "number"],
        ["versions.namespace", "versions.name", "versions.number"],
    ),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("action", String(16), nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("alias", String(63)),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("previous", Integer),
    Column("generation", Integer),
    Column("forced", Boolean, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", String(40), nullable=False),
    Index("events_by_name", "namespace", "name", "seq"),
    sqlite_autoincrement=True,  # a number is never used twice
)

servers = Table(
    "servers",
    metadata,
    Column("server_id", String(64), primary_key=True),
    Column("url", Text, nullable=False),
    Column("seen_at", Float, nullable=False),  # seconds since the epoch
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("server_id", String(64), primary_key=True),
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("alias", String(63), primary_key=True),
    Column("event_seq", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("at", String(40), nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("key_id", String(64), primary_key=True),
    Column("secret_hash", Text, nullable=False),
    Column("tenant", String(63), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("revoked_at", String(40)),
    Column("expires_at", String(40)),
)

# Adapters that a tenant may use beside its own.
shares = Table(
    "shares",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("tenant", String(63), primary_key=True),
    Column("shared_at", String(40), nullable=False),
)

# What a tenant calls: a stable name in front of a selector.
endpoints = Table(
    "endpoints",
    metadata,
    Column("namespace", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("target", String(300)),  # a selector; NULL is the bare base
    Column("defaults", JSON, nullable=False),  # field of a request → value
    Column("generation", Integer, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("changed_at", String(40), nullable=False),
)

endpoint_events = Table(
    "endpoint_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("action", String(16), nullable=False),
    Column("namespace", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("target", String(300)),
    Column("defaults", JSON, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", String(40), nullable=False),
    Index("endpoint_events_by_name", "namespace", "name", "seq"),
    sqlite_autoincrement=True,  # a number is never used twice
)
