"""Servers that follow the store, and what each says about the aliases it serves."""

import time
from datetime import UTC, datetime

from sqlalchemy import Connection, Table, delete, insert, select

from registry.adapter import AdapterName
from registry.database import now
from registry.records import Rollout, RolloutState, ServerRecord
from registry.tables import rollouts, servers

LIVE_SECONDS = 5.0  # a server that was not heard of for longer is not asked
FORGET_SECONDS = 86_400.0  # and one that is silent for a day is forgotten


def heartbeat(connection: Connection, server_id: str, url: str) -> None:
    """Note that a server is alive, and forget those that ended long ago."""
    _replace(connection, servers, {"server_id": server_id}, {"url": url, "seen_at": time.time()})
    ended = servers.c.seen_at < time.time() - FORGET_SECONDS
    ids = connection.execute(select(servers.c.server_id).where(ended)).scalars().all()
    if ids:
        connection.execute(delete(rollouts).where(rollouts.c.server_id.in_(ids)))
        connection.execute(delete(servers).where(servers.c.server_id.in_(ids)))


def live_servers(connection: Connection) -> list[ServerRecord]:
    query = select(servers).where(servers.c.seen_at >= time.time() - LIVE_SECONDS)
    rows = connection.execute(query.order_by(servers.c.url, servers.c.server_id))
    return [ServerRecord(row.server_id, row.url, _iso(row.seen_at)) for row in rows]


def report_rollout(
    connection: Connection,
    server_id: str,
    name: AdapterName,
    alias: str,
    *,
    event_seq: int,
    number: int,
    digest: str,
    state: RolloutState,
    message: str,
    seconds: float,
) -> None:
    _replace(
        connection,
        rollouts,
        {
            "server_id": server_id,
            "namespace": name.namespace,
            "name": name.name,
            "alias": alias,
        },
        {
            "event_seq": event_seq,
            "number": number,
            "digest": digest,
            "state": state,
            "message": message,
            "seconds": seconds,
            "at": now(),
        },
    )


def live_rollouts(connection: Connection, name: AdapterName | None) -> list[Rollout]:
    """Return the latest report of every live server on every alias."""
    query = (
        select(rollouts, servers.c.url)
        .join(servers, servers.c.server_id == rollouts.c.server_id)
        .where(servers.c.seen_at >= time.time() - LIVE_SECONDS)
        .order_by(rollouts.c.namespace, rollouts.c.name, rollouts.c.alias, servers.c.url)
    )
    if name is not None:
        query = query.where(rollouts.c.namespace == name.namespace, rollouts.c.name == name.name)
    return [
        Rollout(
            server_id=row.server_id,
            url=row.url,
            name=AdapterName(row.namespace, row.name),
            alias=row.alias,
            event_seq=row.event_seq,
            number=row.number,
            digest=row.digest,
            state=row.state,
            message=row.message,
            seconds=row.seconds,
            at=row.at,
        )
        for row in connection.execute(query)
    ]


def _replace(
    connection: Connection, table: Table, key: dict[str, str], values: dict[str, object]
) -> None:
    connection.execute(delete(table).where(*(table.c[k] == v for k, v in key.items())))
    connection.execute(insert(table).values(**key, **values))


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
