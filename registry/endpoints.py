"""Endpoints in the database: what a tenant calls, and every change of it.

An endpoint is written like an adapter, `acme/chat`, and goes before an adapter of the same name:
`acme/chat` is the endpoint then, `acme/chat@production` the adapter.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, func, insert, select, update

from registry.adapter import BASE, AdapterName, Selector
from registry.database import now
from registry.errors import AdapterNotFound, Conflict, EndpointNotFound, InvalidName
from registry.records import Endpoint, EndpointAction, EndpointEvent
from registry.shares import list_shares
from registry.tables import endpoint_events, endpoints
from registry.versions import resolve
from registry.whole import refuse_whole

MAX_ENDPOINTS = 1000  # of one tenant


def parse_target(model: str, namespace: str) -> Selector | None:
    """Read what an endpoint points at: a selector, or `base`. Raises InvalidName."""
    return None if model == BASE else Selector.parse(model, namespace)


def merge(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults with the changes; None takes one away (as RFC 7386 patches an object)."""
    merged = {**defaults, **changes}
    return {field: value for field, value in merged.items() if value is not None}


def create_endpoint(
    connection: Connection,
    name: AdapterName,
    target: Selector | None,
    defaults: dict[str, Any],
    *,
    actor: str,
    reason: str,
) -> Endpoint:
    if name.name == BASE:
        raise InvalidName(f"An endpoint cannot be called {BASE!r}: that is the base model.")
    if find_endpoint(connection, name):
        raise Conflict(f"There is already an endpoint {name}. Change it, or take another name.")
    if len(list_endpoints(connection, name.namespace)) >= MAX_ENDPOINTS:
        raise Conflict(f"{name.namespace} has {MAX_ENDPOINTS} endpoints, the most it may have.")
    moment, target = now(), _pin(connection, name.namespace, target)
    generation = _last_generation(connection, name) + 1
    made = Endpoint(name, target, defaults, generation, moment, moment)
    connection.execute(insert(endpoints).values(**_row(made), created_at=moment, changed_at=moment))
    _log(connection, "create", made, actor, reason)
    return made


def change_endpoint(
    connection: Connection,
    name: AdapterName,
    target: Selector | None,
    defaults: dict[str, Any],
    *,
    actor: str,
    reason: str,
    expected_generation: int,
) -> Endpoint:
    """Point an endpoint elsewhere, or give it other defaults; both are replaced whole."""
    known = get_endpoint(connection, name)
    if known.generation != expected_generation:
        raise Conflict(
            f"{name} was changed meanwhile: it is at generation {known.generation}, not "
            f"{expected_generation}. Look at it again."
        )
    target = _pin(connection, name.namespace, target)
    changed = replace(
        known,
        target=target,
        defaults=defaults,
        generation=known.generation + 1,
        changed_at=now(),
    )
    values = {**_row(changed), "changed_at": changed.changed_at}
    connection.execute(update(endpoints).where(*_of(endpoints, name)).values(**values))
    _log(connection, "change", changed, actor, reason)
    return changed


def delete_endpoint(
    connection: Connection, name: AdapterName, *, actor: str, reason: str
) -> Endpoint:
    gone = get_endpoint(connection, name)
    connection.execute(delete(endpoints).where(*_of(endpoints, name)))
    _log(connection, "delete", replace(gone, generation=gone.generation + 1), actor, reason)
    return gone


def find_endpoint(connection: Connection, name: AdapterName) -> Endpoint | None:
    row = connection.execute(select(endpoints).where(*_of(endpoints, name))).first()
    return _endpoint_of(row) if row else None


def get_endpoint(connection: Connection, name: AdapterName) -> Endpoint:
    found = find_endpoint(connection, name)
    if found is None:
        raise no_endpoint(name)
    return found


def no_endpoint(name: AdapterName) -> EndpointNotFound:
    return EndpointNotFound(f"There is no endpoint {name} here.")


def list_endpoints(connection: Connection, namespace: str | None = None) -> list[Endpoint]:
    query = select(endpoints).order_by(endpoints.c.namespace, endpoints.c.name)
    if namespace is not None:
        query = query.where(endpoints.c.namespace == namespace)
    return [_endpoint_of(row) for row in connection.execute(query)]


def list_events(connection: Connection, after: int, limit: int) -> list[EndpointEvent]:
    query = select(endpoint_events).where(endpoint_events.c.seq > after)
    rows = connection.execute(query.order_by(endpoint_events.c.seq).limit(limit))
    return [_event_of(row) for row in rows]


def history(connection: Connection, name: AdapterName) -> list[EndpointEvent]:
    """Return every change of an endpoint, oldest first, also after its end."""
    query = select(endpoint_events).where(*_of(endpoint_events, name))
    return [_event_of(row) for row in connection.execute(query.order_by(endpoint_events.c.seq))]


def last_event(connection: Connection) -> int:
    return connection.execute(select(func.max(endpoint_events.c.seq))).scalar() or 0


def _pin(connection: Connection, namespace: str, target: Selector | None) -> Selector | None:
    """Return the target with its whole digest, when the tenant may use it.

    Raises AdapterNotFound in the words of one that is not there, VersionNotFound, AliasNotFound,
    Conflict for an ambiguous digest, and Refused for a version that nothing can wear.
    """
    if target is None:
        return None
    name = target.name
    shared = any(share.tenant == namespace for share in list_shares(connection, name))
    if name.namespace != namespace and not shared:
        raise AdapterNotFound(f"There is no adapter {name} here.")
    version = resolve(connection, target)
    refuse_whole(version)
    return replace(target, digest=version.digest) if target.digest else target


def _last_generation(connection: Connection, name: AdapterName) -> int:
    """Return the generation a deleted endpoint of this name ended with: numbers never come back."""
    newest = select(func.max(endpoint_events.c.generation)).where(*_of(endpoint_events, name))
    return connection.execute(newest).scalar() or 0


def _log(
    connection: Connection, action: EndpointAction, endpoint: Endpoint, actor: str, reason: str
) -> None:
    row = {**_row(endpoint), "action": action, "actor": actor, "reason": reason, "at": now()}
    connection.execute(insert(endpoint_events).values(**row))


def _row(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "namespace": endpoint.name.namespace,
        "name": endpoint.name.name,
        "target": str(endpoint.target) if endpoint.target else None,
        "defaults": endpoint.defaults,
        "generation": endpoint.generation,
    }


def _of(table: Table, name: AdapterName) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return table.c.namespace == name.namespace, table.c.name == name.name


def _endpoint_of(row: Row[Any]) -> Endpoint:
    return Endpoint(
        name=AdapterName(row.namespace, row.name),
        target=Selector.parse(row.target) if row.target else None,
        defaults=row.defaults,
        generation=row.generation,
        created_at=row.created_at,
        changed_at=row.changed_at,
    )


def _event_of(row: Row[Any]) -> EndpointEvent:
    return EndpointEvent(
        seq=row.seq,
        action=row.action,
        name=AdapterName(row.namespace, row.name),
        model=row.target or BASE,
        defaults=row.defaults,
        generation=row.generation,
        actor=row.actor,
        reason=row.reason,
        at=row.at,
    )
