"""/v1/shadows: mirror a share of an adapter's production traffic to a candidate, over HTTP."""

import asyncio
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Request, get, post
from litestar.params import FromPath
from msgspec import Meta

from serving.api.adapters import decode_body, moving, own_adapter
from serving.api.auth import declare
from serving.api.record import record_of
from serving.api.services import read_json, services_of
from serving.shadow.comparison import Comparison
from serving.shadow.moves import start
from serving.shadow.report import describe, summarize
from serving.tenants.keys import EXPERIMENTS

AnyRequest = Request[Any, Any, Any]


class NewShadow(msgspec.Struct, forbid_unknown_fields=True):
    """What `wardrobe shadow start` takes."""

    candidate: Annotated[str, Meta(min_length=1, max_length=300)]
    share: float = 0.1


class End(msgspec.Struct, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(min_length=1, max_length=2000)]


@post("/v1/adapters/{namespace:str}/{name:str}/shadow", opt=declare(EXPERIMENTS))
async def start_shadow(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Begin to mirror. Running servers take it up once the candidate is loaded and checked."""
    services, actor = services_of(request.app), record_of(request.scope).tenant
    adapter = own_adapter(request, namespace, name)
    wanted = decode_body(await read_json(request), NewShadow)
    begin = partial(
        start,
        services.registry,
        services.comparisons,
        adapter,
        wanted.candidate,
        wanted.share,
        actor,
    )
    return summarize(await moving(begin))


@post(
    "/v1/adapters/{namespace:str}/{name:str}/shadow/stop",
    opt=declare(EXPERIMENTS),
    status_code=200,
)
async def stop_shadow(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Mirror no more; the pairs stay."""
    store = services_of(request.app).comparisons
    adapter = own_adapter(request, namespace, name)
    reason = decode_body(await read_json(request), End).reason

    def stop() -> Comparison:
        return store.stop(store.latest_shadow(adapter), reason)

    return summarize(await asyncio.to_thread(stop))


@get("/v1/adapters/{namespace:str}/{name:str}/shadow", opt=declare(EXPERIMENTS))
async def get_shadow(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Return the adapter's latest shadow with its numbers and what they say."""
    store = services_of(request.app).comparisons
    adapter = own_adapter(request, namespace, name)
    return await asyncio.to_thread(lambda: describe(store, store.latest_shadow(adapter)))


@get("/v1/shadows", opt=declare(EXPERIMENTS))
async def list_shadows(request: AnyRequest) -> dict[str, Any]:
    """Return the caller's shadows, oldest first."""
    principal = request.user
    namespace = None if principal.is_operator else principal.tenant
    store = services_of(request.app).comparisons
    found = await asyncio.to_thread(lambda: store.find(namespace=namespace))
    return {"object": "list", "data": [summarize(comparison) for comparison in found]}
