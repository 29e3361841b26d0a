"""/v1/endpoints: a tenant's stable names, what they point at and what they fill in."""

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Request, delete, get, patch, post
from litestar.params import FromPath
from msgspec import UNSET, Meta, UnsetType

from registry.adapter import BASE, AdapterName
from registry.endpoints import merge, no_endpoint, parse_target
from registry.records import Endpoint
from serving.api.adapters import decode_body, moving
from serving.api.auth import declare
from serving.api.defaults import check_defaults
from serving.api.record import record_of
from serving.api.services import read_json, services_of
from serving.tenants.access import owns
from serving.tenants.keys import ADMIN, READ, no_tenant

AnyRequest = Request[Any, Any, Any]
Text = Annotated[str, Meta(min_length=1, max_length=300)]
Reason = Annotated[str, Meta(max_length=2000)]


class NewEndpoint(msgspec.Struct, forbid_unknown_fields=True):
    """What `wardrobe endpoint create` takes."""

    name: Text
    model: Text
    defaults: dict[str, Any] = {}
    reason: Reason = ""


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be another; a default that is null is taken away."""

    model: Text | UnsetType = UNSET
    defaults: dict[str, Any] = {}
    reason: Reason = ""
    expected_generation: int | None = None  # refuse when somebody changed it meanwhile


@post("/v1/endpoints", opt=declare(ADMIN))
async def create_endpoint(request: AnyRequest) -> dict[str, Any]:
    """Make an endpoint. Running servers answer it within a second."""
    services, caller = services_of(request.app), request.user
    wanted = decode_body(await read_json(request), NewEndpoint)
    name = AdapterName.parse(wanted.name, caller.namespace)
    if not owns(caller, name):
        raise no_tenant(name.namespace)
    check_defaults(wanted.defaults)
    create = partial(
        services.registry.create_endpoint,
        name,
        parse_target(_model(request, wanted.model), name.namespace),
        wanted.defaults,
        actor=record_of(request.scope).tenant,
        reason=wanted.reason,
    )
    return facts_of(await moving(create))


@get("/v1/endpoints", opt=declare(READ))
async def list_endpoints(request: AnyRequest) -> dict[str, Any]:
    """Return the caller's endpoints, by name."""
    caller, registry = request.user, services_of(request.app).registry
    namespace = None if caller.is_operator else caller.tenant
    found = await asyncio.to_thread(registry.endpoints, namespace)
    return {"object": "list", "data": [facts_of(endpoint) for endpoint in found]}


@get("/v1/endpoints/{namespace:str}/{name:str}", opt=declare(READ))
async def get_endpoint(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Return an endpoint and every change of it, oldest first."""
    registry = services_of(request.app).registry
    own = _own(request, namespace, name)
    endpoint = await asyncio.to_thread(registry.endpoint, own)
    history = await asyncio.to_thread(registry.endpoint_history, own)
    events = [{**asdict(event), "name": str(event.name)} for event in history]
    return {**facts_of(endpoint), "history": events}


@patch("/v1/endpoints/{namespace:str}/{name:str}", opt=declare(ADMIN))
async def change_endpoint(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Point it elsewhere, or change defaults; what is left out stays as it is."""
    registry, actor = services_of(request.app).registry, record_of(request.scope).tenant
    own = _own(request, namespace, name)
    wanted = decode_body(await read_json(request), Change)
    model = None if wanted.model is UNSET else _model(request, wanted.model)
    known = await asyncio.to_thread(registry.endpoint, own)
    defaults = merge(known.defaults, wanted.defaults)
    check_defaults(defaults)
    expected = wanted.expected_generation
    change = partial(
        registry.change_endpoint,
        own,
        known.target if model is None else parse_target(model, own.namespace),
        defaults,
        actor=actor,
        reason=wanted.reason,
        expected_generation=known.generation if expected is None else expected,
    )
    return facts_of(await moving(change))


@delete("/v1/endpoints/{namespace:str}/{name:str}", opt=declare(ADMIN), status_code=200)
async def delete_endpoint(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """End an endpoint; its name is free, its history stays."""
    registry, actor = services_of(request.app).registry, record_of(request.scope).tenant
    own = _own(request, namespace, name)
    gone = await asyncio.to_thread(partial(registry.delete_endpoint, own, actor=actor))
    return {"object": "endpoint", "id": str(gone.name), "deleted": True}


def facts_of(endpoint: Endpoint) -> dict[str, Any]:
    return {"object": "endpoint", **endpoint.facts()}


def _own(request: AnyRequest, namespace: str, name: str) -> AdapterName:
    """Return the endpoint's name when it may be the caller's. Raises EndpointNotFound."""
    parsed = AdapterName.parse(f"{namespace}/{name}")
    if not owns(request.user, parsed):
        raise no_endpoint(parsed)
    return parsed


def _model(request: AnyRequest, model: str) -> str:
    """Return the model; this server's base by its id means the base of whichever server answers."""
    return BASE if services_of(request.app).router.is_base(model) else model
