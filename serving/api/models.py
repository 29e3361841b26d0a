"""GET /v1/models: the base, and every endpoint and adapter that can be asked for now.

The cards have the fields of vLLM's; `root` is the digest of what answers, never a path.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from typing import Any

from litestar import Request, get
from litestar.params import FromPath

from registry.adapter import PRODUCTION, AdapterName, Version
from registry.records import Endpoint
from serving.api.auth import declare, everywhere
from serving.api.services import Services, services_of
from serving.tenants.keys import READ, Principal


@get(everywhere("/v1/models"), opt=declare(READ))
async def list_models(request: Request[Any, Any, Any]) -> dict[str, Any]:
    services = services_of(request.app)
    usable = await services.access.usable(request.user)
    # In a thread: thousands take tens of milliseconds.
    return await asyncio.to_thread(_list, services, request.user, usable)


def _list(
    services: Services, caller: Principal, usable: Callable[[AdapterName], bool]
) -> dict[str, Any]:
    own = services.endpoints.owned_by(caller)
    taken = {endpoint.name for endpoint in own}
    versions = services.live.versions.copy()  # at once: the follower goes on
    live = sorted(versions.items(), key=lambda item: (str(item[0][0]), item[0][1]))
    cards = [
        adapter_card(services, alias_id(name, alias, name in taken), version)
        for (name, alias), version in live
        if usable(name)
    ]
    listed = (_listed(services, endpoint, usable) for endpoint in own)
    found = [card for card in listed if card]
    if caller.is_operator:
        loaded = services.loaded.versions.copy()
        cards += [adapter_card(services, name, version) for name, version in loaded.items()]
    return {"object": "list", "data": [base_card(services), *found, *cards]}


def _listed(
    services: Services, endpoint: Endpoint, usable: Callable[[AdapterName], bool]
) -> dict[str, Any] | None:
    """Return the card of an endpoint that this server can answer now."""
    target = endpoint.target
    if target is None:
        return endpoint_card(services, endpoint, None)
    version = services.router.known(target)
    if version is None and target.alias is None:  # pinned, and nobody has asked for it yet
        version = services.registry.resolve(target)
    if version is None or version.base_id != services.base.id or not usable(target.name):
        return None
    return endpoint_card(services, endpoint, version)


@get(everywhere("/v1/models/{model:path}"), opt=declare(READ))
async def get_model(request: Request[Any, Any, Any], model: FromPath[str]) -> dict[str, Any]:
    services, caller = services_of(request.app), request.user
    name = model.removeprefix("/")
    if services.router.is_base(name):
        return base_card(services)
    if loaded := services.loaded.of(name, caller):
        return adapter_card(services, name, loaded)
    if endpoint := services.endpoints.of(name, caller):
        return endpoint_card(services, endpoint, await services.router.version_of(endpoint))
    return adapter_card(services, name, await services.router.version(name, caller))


def served_names(services: Services) -> dict[str, list[str]]:
    """Return digest → what a client may write into `model` to be answered by it now."""
    names: dict[str, list[str]] = defaultdict(list)
    for (name, alias), version in services.live.versions.copy().items():
        names[version.digest].append(alias_id(name, alias, taken=False))
    for loaded, version in services.loaded.versions.copy().items():
        names[version.digest].append(loaded)
    for endpoint in services.endpoints.known.copy().values():
        version = services.router.known(endpoint.target) if endpoint.target else None
        if version is not None:
            names[version.digest].append(str(endpoint.name))
    return names


def alias_id(name: AdapterName, alias: str, taken: bool) -> str:
    """Return what a client writes into `model`.

    A bare name means `production`, unless an endpoint has taken it.
    """
    return str(name) if alias == PRODUCTION and not taken else f"{name}@{alias}"


def base_card(services: Services) -> dict[str, Any]:
    base = services.base
    return _card(services, base.id, 0, base.fingerprint, parent=None, owner="wardrobe")


def endpoint_card(
    services: Services, endpoint: Endpoint, version: Version | None
) -> dict[str, Any]:
    """`version` is what it means now; None for the base."""
    base = services.base
    digest = version.digest if version else base.fingerprint
    owner, made = endpoint.name.namespace, _seconds(endpoint.created_at)
    card = _card(services, str(endpoint.name), made, digest, parent=base.id, owner=owner)
    return {
        **card,
        "endpoint": endpoint.model,
        "version": version.ref.label if version else base.id,
    }


def adapter_card(services: Services, model: str, version: Version) -> dict[str, Any]:
    owner, published = version.name.namespace, _seconds(version.created_at)
    card = _card(services, model, published, version.digest, parent=version.base_id, owner=owner)
    return {**card, "version": version.ref.label, "kind": version.kind, "rank": version.rank}


def _seconds(iso: str) -> int:
    return int(datetime.fromisoformat(iso).timestamp())


def _card(
    services: Services, model: str, created: int, digest: str, *, parent: str | None, owner: str
) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": owner,
        "root": f"sha256:{digest}",
        "parent": parent,
        "max_model_len": services.engine.max_model_len,
    }
