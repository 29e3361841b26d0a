"""What there is of a tenant, which nobody makes: it is whoever has a key, adapter or endpoint."""

from dataclasses import dataclass

from registry.database import now
from registry.store import Registry
from serving.tenants.keys import no_tenant


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
    moment = now()
    keys, adapters = registry.keys(), registry.adapters()
    shares, endpoints = registry.shares(), registry.endpoints()
    names = {key.tenant for key in keys} | {share.tenant for share in shares}
    names |= {name.namespace for name in adapters}
    names |= {endpoint.name.namespace for endpoint in endpoints}
    return [
        Tenant(
            name,
            sum(key.tenant == name and key.valid_at(moment) for key in keys),
            tuple(str(adapter) for adapter in adapters if adapter.namespace == name),
            tuple(str(share.name) for share in shares if share.tenant == name),
            tuple(str(e.name) for e in endpoints if e.name.namespace == name),
        )
        for name in sorted(names)
    ]


def get_tenant(registry: Registry, name: str) -> Tenant:
    """Raises TenantNotFound."""
    for tenant in list_tenants(registry):
        if tenant.name == name:
            return tenant
    raise no_tenant(name)
