"""What there is of a tenant, which nobody makes: it is whoever has a key, adapter or endpoint."""

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from registry.adapter import AdapterName
from registry.database import now
from registry.store import Registry
from serving.tenants.keys import OPERATOR, TenantNotFound, no_tenant

MOST_SHOWN = 20  # names in a refusal


@dataclass(frozen=True, slots=True)
class Tenant:
    """All a tenant has in the registry, by name."""

    name: str
    valid_keys: int
    adapters: tuple[str, ...]
    shared: tuple[str, ...]  # adapters of others that it may use
    endpoints: tuple[str, ...]


def list_tenants(registry: Registry) -> list[Tenant]:
    """Return every tenant, by name."""
    moment, keys = now(), registry.keys()
    valid = Counter(key.tenant for key in keys if key.valid_at(moment))
    adapters = _by_tenant((name.namespace, name) for name in registry.adapters())
    shared = _by_tenant((share.tenant, share.name) for share in registry.shares())
    endpoints = _by_tenant((e.name.namespace, e.name) for e in registry.endpoints())
    names = {key.tenant for key in keys}.union(adapters, shared, endpoints)
    return [
        Tenant(
            name,
            valid[name],
            tuple(adapters.get(name, ())),
            tuple(shared.get(name, ())),
            tuple(endpoints.get(name, ())),
        )
        for name in sorted(names)
    ]


def _by_tenant(names: Iterable[tuple[str, AdapterName]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tenant, name in names:
        found.setdefault(tenant, []).append(str(name))
    return found


def get_tenant(registry: Registry, name: str) -> Tenant:
    """Raises TenantNotFound."""
    for tenant in list_tenants(registry):
        if tenant.name == name:
            return tenant
    raise no_tenant(name)


def require_tenant(registry: Registry, name: str) -> None:
    """Raise TenantNotFound with the names there are: for the operator's eyes only."""
    known = [tenant.name for tenant in list_tenants(registry)]
    if name in (OPERATOR, *known):
        return
    near = difflib.get_close_matches(name, known)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    shown = [*known[:MOST_SHOWN], *(["…"] if len(known) > MOST_SHOWN else [])]
    raise TenantNotFound(
        f"There is no tenant {name!r}. {meant}A tenant is whoever has a key, an adapter or an "
        f"endpoint, here: {', '.join(shown) or 'nobody'}."
    )
