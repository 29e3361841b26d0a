"""Versions in the database: numbering them and finding the one a selector means."""

from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select

from registry.adapter import AdapterName, Selector, Version
from registry.errors import AdapterNotFound, AliasNotFound, Conflict, VersionNotFound
from registry.tables import aliases, versions

_POINTS = (
    (aliases.c.namespace == versions.c.namespace)
    & (aliases.c.name == versions.c.name)
    & (aliases.c.number == versions.c.number)
)


def add_version(connection: Connection, version: Version) -> None:
    connection.execute(
        insert(versions).values(
            namespace=version.name.namespace,
            name=version.name.name,
            number=version.number,
            digest=version.digest,
            kind=version.kind,
            base_id=version.base_id,
            base_fingerprint=version.base_fingerprint,
            rank=version.rank,
            size_bytes=version.size_bytes,
            created_at=version.created_at,
            files=version.files,
            system_prompt=version.system_prompt,
            card=version.card,
        )
    )


def next_number(connection: Connection, name: AdapterName) -> int:
    query = select(func.max(versions.c.number)).where(*_of(name))
    return (connection.execute(query).scalar() or 0) + 1


def find_digest(connection: Connection, name: AdapterName, digest: str) -> Version | None:
    row = connection.execute(_select(name).where(versions.c.digest == digest)).first()
    return version_of(row) if row else None


def find_content(connection: Connection, digest: str) -> Version | None:
    """Return a version with this digest under any name: all of them have the same files."""
    row = connection.execute(select(versions).where(versions.c.digest == digest).limit(1)).first()
    return version_of(row) if row else None


def list_names(connection: Connection) -> list[AdapterName]:
    columns = (versions.c.namespace, versions.c.name)
    rows = connection.execute(select(*columns).distinct().order_by(*columns))
    return [AdapterName(namespace, name) for namespace, name in rows]


def list_versions(connection: Connection, name: AdapterName) -> list[Version]:
    """Return the versions of one adapter, oldest first. Raises AdapterNotFound."""
    rows = connection.execute(_select(name).order_by(versions.c.number)).all()
    if not rows:
        raise _no_adapter(name)
    return [version_of(row) for row in rows]


def list_newest(connection: Connection) -> list[tuple[Version, int]]:
    """Return the newest version of every adapter and how many it has, by name."""
    columns = (versions.c.namespace, versions.c.name)
    counts = (
        select(*columns, func.max(versions.c.number).label("newest"), func.count().label("count"))
        .group_by(*columns)
        .subquery()
    )
    same = (
        (versions.c.namespace == counts.c.namespace)
        & (versions.c.name == counts.c.name)
        & (versions.c.number == counts.c.newest)
    )
    query = select(versions, counts.c["count"]).join(counts, same).order_by(*columns)
    return [(version_of(row), row[-1]) for row in connection.execute(query)]


def all_versions(connection: Connection) -> list[Version]:
    order = (versions.c.namespace, versions.c.name, versions.c.number)
    return [version_of(row) for row in connection.execute(select(versions).order_by(*order))]


def list_aliased(connection: Connection, base_id: str) -> list[tuple[str, Version]]:
    """Return every alias with its version, where that is one of a base."""
    query = select(aliases.c.alias, versions).join(aliases, _POINTS)
    rows = connection.execute(query.where(versions.c.base_id == base_id))
    return [(row.alias, version_of(row)) for row in rows]


def resolve(connection: Connection, selector: Selector) -> Version:
    """Return the version that a selector means now.

    Raises AdapterNotFound, VersionNotFound, AliasNotFound, or Conflict when the start of a digest
    fits several versions.
    """
    name, query = selector.name, _select(selector.name)
    if selector.number is not None:
        query = query.where(versions.c.number == selector.number)
    elif selector.digest is not None:
        # A range, so that the index is used; "g" sorts after every hex digit.
        low, high = selector.digest, selector.digest + "g"
        query = query.where(versions.c.digest >= low, versions.c.digest < high)
    else:
        query = query.join(aliases, _POINTS).where(aliases.c.alias == selector.alias)
    rows = connection.execute(query.limit(2)).all()
    if len(rows) > 1:
        raise Conflict(f"{selector} fits several versions of {name}. Write more digits.")
    if not rows:
        raise _missing(connection, selector)
    return version_of(rows[0])


def version_of(row: Row[Any]) -> Version:
    return Version(
        name=AdapterName(row.namespace, row.name),
        number=row.number,
        digest=row.digest,
        kind=row.kind,
        base_id=row.base_id,
        base_fingerprint=row.base_fingerprint,
        rank=row.rank,
        size_bytes=row.size_bytes,
        created_at=row.created_at,
        files=row.files,
        system_prompt=row.system_prompt,
        card=row.card,
    )


def _of(name: AdapterName) -> tuple[Any, Any]:
    return versions.c.namespace == name.namespace, versions.c.name == name.name


def _select(name: AdapterName) -> Select[Any]:
    return select(versions).where(*_of(name))


def _missing(
    connection: Connection, selector: Selector
) -> AdapterNotFound | VersionNotFound | AliasNotFound:
    name = selector.name
    if connection.execute(_select(name).limit(1)).first() is None:
        return _no_adapter(name)
    if selector.alias is not None:
        return AliasNotFound(
            f"{name} has no alias {selector.alias!r}.",
            command="Set it with: "
            f"wardrobe promote {name}@vN --alias {selector.alias} --reason TEXT",
        )
    return VersionNotFound(f"There is no {selector}.", command=f"See: wardrobe show {name}")


def _no_adapter(name: AdapterName) -> AdapterNotFound:
    return AdapterNotFound(f"There is no adapter {name} here.", command="See: wardrobe list")
