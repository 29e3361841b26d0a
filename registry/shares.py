"""Rows of shares: which adapters a tenant may use beside its own."""

from sqlalchemy import Connection, delete, insert, select

from registry.adapter import AdapterName
from registry.database import now
from registry.errors import InvalidName
from registry.records import Share
from registry.tables import shares
from registry.versions import list_versions


def share(connection: Connection, name: AdapterName, tenant: str) -> Share:
    """Let a tenant use an adapter. Idempotent. Raises AdapterNotFound, InvalidName for its own."""
    list_versions(connection, name)
    if tenant == name.namespace:
        raise InvalidName(f"{name} is {tenant}'s own. Share it with another tenant.")
    known = [found for found in list_shares(connection, name) if found.tenant == tenant]
    if known:
        return known[0]
    made = Share(name, tenant, now())
    row = {"namespace": name.namespace, "name": name.name, "tenant": tenant}
    connection.execute(insert(shares).values(**row, shared_at=made.shared_at))
    return made


def unshare(connection: Connection, name: AdapterName, tenant: str) -> bool:
    """Take a share back; tell whether there was one."""
    same = (
        (shares.c.namespace == name.namespace)
        & (shares.c.name == name.name)
        & (shares.c.tenant == tenant)
    )
    return connection.execute(delete(shares).where(same)).rowcount > 0


def list_shares(connection: Connection, name: AdapterName | None = None) -> list[Share]:
    query = select(shares).order_by(shares.c.namespace, shares.c.name, shares.c.tenant)
    if name is not None:
        query = query.where(shares.c.namespace == name.namespace, shares.c.name == name.name)
    return [
        Share(AdapterName(row.namespace, row.name), row.tenant, row.shared_at)
        for row in connection.execute(query)
    ]
