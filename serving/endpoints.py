"""The endpoints as this server answers them now. Written by their follower, read by the router."""

from dataclasses import dataclass, field

from registry.adapter import AdapterName
from registry.errors import InvalidName
from registry.records import Endpoint
from serving.tenants.access import owns
from serving.tenants.keys import Principal


@dataclass(slots=True)
class LiveEndpoints:
    """What every endpoint is, and why one is not yet what the registry says."""

    known: dict[AdapterName, Endpoint] = field(default_factory=dict[AdapterName, Endpoint])
    failures: dict[AdapterName, str] = field(default_factory=dict[AdapterName, str])

    def of(self, model: str, principal: Principal) -> Endpoint | None:
        """Return the caller's endpoint that a request's `model` names, if it names one."""
        try:
            name = AdapterName.parse(model, principal.namespace)
        except InvalidName:
            return None  # a selector with an @, or nothing that is a name at all
        return self.known.get(name) if owns(principal, name) else None

    def owned_by(self, principal: Principal) -> list[Endpoint]:
        """Return the caller's endpoints, by name; the operator's are all."""
        own = [endpoint for name, endpoint in self.known.items() if owns(principal, name)]
        return sorted(own, key=lambda endpoint: str(endpoint.name))
