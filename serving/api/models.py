"""GET /v1/models: the base and every adapter that can be asked for now."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from litestar import Request, get
from litestar.params import FromPath

from registry.adapter import PRODUCTION, AdapterName, Version
from serving.api.auth import declare
from serving.api.services import Services, services_of
from serving.tenants.keys import READ


@get("/v1/models", opt=declare(READ))
async def list_models(request: Request[Any, Any, Any]) -> dict[str, Any]:
    services = services_of(request.app)
    usable = await services.access.usable(request.user)
    # In a thread: thousands take tens of milliseconds.
    return await asyncio.to_thread(_list, services, usable)


def _list(services: Services, usable: Callable[[AdapterName], bool]) -> dict[str, Any]:
    versions = services.live.versions.copy()  # at once: the follower goes on
    live = sorted(versions.items(), key=lambda item: (str(item[0][0]), item[0][1]))
    cards = [
        adapter_card(services, alias_id(str(name), alias), version)
        for (name, alias), version in live
        if usable(name)
    ]
    return {"object": "list", "data": [base_card(services), *cards]}


@get("/v1/models/{model:path}", opt=declare(READ))
async def get_model(request: Request[Any, Any, Any], model: FromPath[str]) -> dict[str, Any]:
    services = services_of(request.app)
    name = model.removeprefix("/")
    if services.router.is_base(name):
        return base_card(services)
    version = await services.router.version(name, request.user)
    return adapter_card(services, name, version)


def alias_id(name: str, alias: str) -> str:
    """Return what a client writes into `model`; `production` is what a bare name means."""
    return name if alias == PRODUCTION else f"{name}@{alias}"


def base_card(services: Services) -> dict[str, Any]:
    base = services.base
    return _card(services, base.id, 0, base.fingerprint, parent=None, owner="wardrobe")


def adapter_card(services: Services, model: str, version: Version) -> dict[str, Any]:
    published = int(datetime.fromisoformat(version.created_at).timestamp())
    owner = version.name.namespace
    card = _card(services, model, published, version.digest, parent=version.base_id, owner=owner)
    return {**card, "version": version.ref.label, "kind": version.kind, "rank": version.rank}


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
