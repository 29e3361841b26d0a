"""Aliases in the database: promote puts a version on top of a stack, rollback takes it away."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, delete, func, insert, select, update

from registry.adapter import AdapterName, Selector, Version
from registry.database import now
from registry.errors import AliasNotFound, Conflict
from registry.records import Action, Alias, AliasMove, Event
from registry.tables import alias_stack, aliases, events, versions
from registry.versions import resolve
from registry.whole import refuse_whole


def promote(
    connection: Connection,
    name: AdapterName,
    number: int,
    alias: str,
    *,
    reason: str,
    actor: str,
    force: bool,
    expected_generation: int | None,
) -> AliasMove:
    """Point the alias to a version. Does nothing when it points there already."""
    version = resolve(connection, Selector(name, number=number))
    current = find_alias(connection, name, alias)
    generation = current.generation if current else 0
    if expected_generation is not None and expected_generation != generation:
        raise Conflict(_moved_meanwhile(name, alias, current, expected_generation))
    if current and current.number == number:
        return AliasMove(current, number, moved=False)
    refuse_whole(version)
    if version.gate_failures and not force:
        raise Conflict(
            f"{name}@v{number} did not pass its gate: {'; '.join(version.gate_failures)} "
            "Promote a version that passes, or use --force."
        )
    depth = _depth(connection, name, alias) + 1
    connection.execute(insert(alias_stack).values(**_key(name, alias), depth=depth, number=number))
    forced = bool(version.gate_failures)
    return _move(connection, "promote", version, alias, current, depth, reason, actor, forced)


def rollback(
    connection: Connection, name: AdapterName, alias: str, *, reason: str, actor: str
) -> AliasMove:
    """Point the alias to where it pointed before the promote that is undone."""
    resolve(connection, Selector(name, alias=alias))
    current = find_alias(connection, name, alias)
    depth = _depth(connection, name, alias)
    below = select(alias_stack.c.number).where(
        *_of(alias_stack, name, alias), alias_stack.c.depth == depth - 1
    )
    number = connection.execute(below).scalar()
    if current is None or number is None:
        raise Conflict(
            f"{name}@{alias} has nothing to roll back to: it was promoted once and never moved."
        )
    connection.execute(
        delete(alias_stack).where(*_of(alias_stack, name, alias), alias_stack.c.depth == depth)
    )
    version = resolve(connection, Selector(name, number=number))
    return _move(connection, "rollback", version, alias, current, depth - 1, reason, actor, False)


def find_alias(connection: Connection, name: AdapterName, alias: str) -> Alias | None:
    row = connection.execute(_with_digest().where(*_of(aliases, name, alias))).first()
    return _alias_of(row) if row else None


def list_aliases(connection: Connection, name: AdapterName | None = None) -> list[Alias]:
    query = _with_digest().order_by(aliases.c.namespace, aliases.c.name, aliases.c.alias)
    if name is not None:
        query = query.where(*_of(aliases, name))
    return [_alias_of(row) for row in connection.execute(query)]


def add_event(
    connection: Connection,
    action: Action,
    version: Version,
    *,
    alias: str | None = None,
    previous: int | None = None,
    generation: int | None = None,
    forced: bool = False,
    actor: str,
    reason: str = "",
) -> int:
    """Append to the log and return the number of the event."""
    result = connection.execute(
        insert(events)
        .values(
            action=action,
            namespace=version.name.namespace,
            name=version.name.name,
            alias=alias,
            number=version.number,
            digest=version.digest,
            previous=previous,
            generation=generation,
            forced=forced,
            actor=actor,
            reason=reason,
            at=now(),
        )
        .returning(events.c.seq)
    )
    return result.scalar_one()


def list_events(connection: Connection, after: int, limit: int) -> list[Event]:
    query = select(events).where(events.c.seq > after).order_by(events.c.seq).limit(limit)
    return [_event_of(row) for row in connection.execute(query)]


def history(connection: Connection, name: AdapterName, alias: str | None) -> list[Event]:
    """Return the moves of the aliases of an adapter, oldest first."""
    query = select(events).where(*_of(events, name), events.c.action != "push")
    if alias is not None:
        query = query.where(events.c.alias == alias)
    found = [_event_of(row) for row in connection.execute(query.order_by(events.c.seq))]
    if not found and alias is not None:
        raise AliasNotFound(f"{name} never had an alias {alias!r}.")
    return found


def last_event(connection: Connection) -> int:
    return connection.execute(select(func.max(events.c.seq))).scalar() or 0


def _move(
    connection: Connection,
    action: Action,
    version: Version,
    alias: str,
    current: Alias | None,
    depth: int,
    reason: str,
    actor: str,
    forced: bool,
) -> AliasMove:
    generation = current.generation + 1 if current else 1
    previous = current.number if current else None
    seq = add_event(
        connection,
        action,
        version,
        alias=alias,
        previous=previous,
        generation=generation,
        forced=forced,
        actor=actor,
        reason=reason,
    )
    name, at = version.name, now()
    values = {
        "number": version.number,
        "depth": depth,
        "generation": generation,
        "event_seq": seq,
        "moved_at": at,
    }
    if current is None:
        connection.execute(insert(aliases).values(**_key(name, alias), **values))
    else:
        connection.execute(update(aliases).where(*_of(aliases, name, alias)).values(**values))
    moved = Alias(name, alias, version.number, version.digest, generation, seq, at)
    return AliasMove(moved, previous, moved=True)


def _moved_meanwhile(
    name: AdapterName, alias: str, current: Alias | None, expected_generation: int
) -> str:
    where = f"at v{current.number}, generation {current.generation}" if current else "not set"
    return (
        f"{name}@{alias} was moved by somebody else: it is {where}, "
        f"not generation {expected_generation}. Look again and repeat."
    )


def _depth(connection: Connection, name: AdapterName, alias: str) -> int:
    query = select(func.max(alias_stack.c.depth)).where(*_of(alias_stack, name, alias))
    return connection.execute(query).scalar() or 0


def _key(name: AdapterName, alias: str) -> dict[str, str]:
    return {"namespace": name.namespace, "name": name.name, "alias": alias}


def _of(table: Table, name: AdapterName, alias: str | None = None) -> list[ColumnElement[bool]]:
    found = [table.c.namespace == name.namespace, table.c.name == name.name]
    return found if alias is None else [*found, table.c.alias == alias]


def _with_digest() -> Any:
    same = (
        (aliases.c.namespace == versions.c.namespace)
        & (aliases.c.name == versions.c.name)
        & (aliases.c.number == versions.c.number)
    )
    return select(aliases, versions.c.digest).join(versions, same)


def _alias_of(row: Row[Any]) -> Alias:
    return Alias(
        name=AdapterName(row.namespace, row.name),
        alias=row.alias,
        number=row.number,
        digest=row.digest,
        generation=row.generation,
        event_seq=row.event_seq,
        moved_at=row.moved_at,
    )


def _event_of(row: Row[Any]) -> Event:
    return Event(
        seq=row.seq,
        action=row.action,
        name=AdapterName(row.namespace, row.name),
        alias=row.alias,
        number=row.number,
        digest=row.digest,
        previous=row.previous,
        generation=row.generation,
        forced=row.forced,
        actor=row.actor,
        reason=row.reason,
        at=row.at,
    )
