"""Who may call a route: declared at the route, checked before its handler, denied by default."""

from typing import Any

from litestar import Litestar
from litestar.connection import ASGIConnection
from litestar.exceptions import MethodNotAllowedException
from litestar.handlers import BaseRouteHandler
from litestar.routes import HTTPRoute

from serving.api.record import record_of
from serving.tenants.keys import ANYBODY, SCOPES, InvalidKey, KeyRing, Principal

OPEN = "open"  # the one declaration that asks for no key
MAX_KEY_CHARACTERS = 256
TENANT_PATH = "/t/{whose:str}"

Connection = ASGIConnection[Any, Any, Any, Any]


class UndeclaredRoute(Exception):
    """A route that does not say who may call it stops the server at start."""


def declare(scope: str, *, operator: bool = False) -> dict[str, Any]:
    """Return the `opt` of a route that asks for this scope, and perhaps for the operator's key."""
    assert scope in (*SCOPES, OPEN), scope
    return {"scope": scope, "operator": operator}


def everywhere(path: str) -> list[str]:
    """Return the paths of a route that a client finds under its tenant's own address, too."""
    return [path, TENANT_PATH + path]


class Authentication:
    """The app-wide guard."""

    def __init__(self, keys: KeyRing | None) -> None:
        """Without a key ring everybody is the operator; settings allow that on loopback only."""
        self._keys = keys

    async def authorize(self, connection: Connection, handler: BaseRouteHandler) -> None:
        scope = handler.opt.get("scope")
        if scope is None:  # Litestar's own OPTIONS answers; ours all declare
            raise MethodNotAllowedException
        if scope == OPEN:
            return
        principal = await self.principal(connection)
        connection.scope["user"] = principal
        record = record_of(connection.scope)
        record.tenant = principal.tenant
        # Before the scope: at another tenant's address there is nothing, for any key.
        for named in (connection.path_params.get("whose"), record.host_tenant):
            if named:
                principal.require_tenant(named)
        principal.require(scope)
        if handler.opt["operator"]:
            principal.require_operator()

    async def principal(self, connection: Connection) -> Principal:
        if self._keys is None:
            return ANYBODY
        kind, _, text = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not text or len(text) > MAX_KEY_CHARACTERS:
            raise InvalidKey(
                "This route needs an API key. Send `Authorization: Bearer wr_…`. "
                "The first key was printed when the server started for the first time."
            )
        return await self._keys.check(text)


def check_declared(app: Litestar) -> None:
    """Raise UndeclaredRoute when a route does not say who may call it."""
    for route in app.routes:
        handlers = route.route_handlers if isinstance(route, HTTPRoute) else []
        if not handlers:
            raise UndeclaredRoute(f"{route.path} is not an HTTP route of ours")
        for handler in handlers:
            automatic = handler.http_methods == {"OPTIONS"}
            if "scope" not in handler.opt and not automatic:
                raise UndeclaredRoute(
                    f"{sorted(handler.http_methods)} {route.path} does not declare its scope: "
                    "add opt=declare(…)."
                )
