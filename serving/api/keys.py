"""/v1/keys and /v1/tenants: the keys of a tenant, shown once, and what a tenant has."""

import asyncio
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import FromPath
from msgspec import Meta

from registry.errors import KeyNotFound
from registry.records import KeyRecord
from registry.store import Registry
from serving.api.adapters import decode_body, moving
from serving.api.auth import declare
from serving.api.services import read_json, services_of
from serving.tenants.duration import parse_duration
from serving.tenants.keys import (
    ADMIN,
    READ,
    Principal,
    add_key,
    describe,
    id_of,
    no_tenant,
    rotate_key,
)
from serving.tenants.tenants import get_tenant, list_tenants

AnyRequest = Request[Any, Any, Any]
Span = Annotated[str, Meta(max_length=8)]


class NewKey(msgspec.Struct, forbid_unknown_fields=True):
    """Without a tenant the key is the caller's own."""

    scopes: Annotated[list[str], Meta(min_length=1, max_length=16)]
    tenant: Annotated[str, Meta(min_length=1, max_length=63)] | None = None
    expires: Span | None = None  # such as 90d, from now
    # Of the caller's choice: a wish that is sent again because its answer was lost is a 409 then,
    # and no second key that nobody knows of.
    id: Annotated[str, Meta(pattern="^[0-9a-f]{12}$")] | None = None


class Rotation(msgspec.Struct, forbid_unknown_fields=True):
    """How long the key before it still works."""

    grace: Span = "1h"


@post("/v1/keys", opt=declare(ADMIN))
async def create_key(request: AnyRequest) -> Response[dict[str, Any]]:
    """Make a key and show it, this once. A tenant's admin makes keys of that tenant only."""
    registry, caller = services_of(request.app).registry, request.user
    wanted = decode_body(await read_json(request), NewKey)
    tenant = caller.tenant if wanted.tenant is None else wanted.tenant
    if tenant != caller.tenant and not caller.is_operator:
        raise no_tenant(tenant)
    lifetime = None if wanted.expires is None else parse_duration(wanted.expires)
    add = partial(add_key, registry, tenant, wanted.scopes, lifetime, key_id=wanted.id)
    return await _shown_once(registry, await moving(add))


@get("/v1/keys", opt=declare(ADMIN))
async def list_keys(request: AnyRequest) -> dict[str, Any]:
    """Return the caller's tenant's keys, of the operator all, oldest first; never the secrets."""
    found = await asyncio.to_thread(services_of(request.app).registry.keys)
    mine = [describe(key) for key in found if _owns(request.user, key)]
    return {"object": "list", "data": mine}


@post("/v1/keys/{key:str}/rotate", opt=declare(ADMIN))
async def rotate(request: AnyRequest, key: FromPath[str]) -> Response[dict[str, Any]]:
    """Make a key like this one and show it, this once; the old one works on for the grace."""
    registry = services_of(request.app).registry
    grace = parse_duration(decode_body(await read_json(request), Rotation).grace)
    old = await _own(request, key)
    text = await asyncio.to_thread(rotate_key, registry, old.key_id, grace)
    return await _shown_once(registry, text)


@delete("/v1/keys/{key:str}", opt=declare(ADMIN), status_code=200)
async def revoke(request: AnyRequest, key: FromPath[str]) -> dict[str, Any]:
    """End a key; every server refuses it within a second."""
    registry, own = services_of(request.app).registry, await _own(request, key)
    return describe(await asyncio.to_thread(registry.revoke_key, own.key_id))


@get("/v1/tenants", opt=declare(READ, operator=True))
async def get_tenants(request: AnyRequest) -> dict[str, Any]:
    """Return every tenant and what it has, by name."""
    found = await asyncio.to_thread(list_tenants, services_of(request.app).registry)
    return {"object": "list", "data": [{"object": "tenant", **asdict(t)} for t in found]}


@get("/v1/tenants/{tenant:str}", opt=declare(READ))
async def get_one_tenant(request: AnyRequest, tenant: FromPath[str]) -> dict[str, Any]:
    """Return what a tenant has: one's own, or any for the operator."""
    caller: Principal = request.user
    if not caller.is_operator:
        caller.require_tenant(tenant)
    found = await asyncio.to_thread(get_tenant, services_of(request.app).registry, tenant)
    return {"object": "tenant", **asdict(found)}


async def _shown_once(registry: Registry, text: str) -> Response[dict[str, Any]]:
    record = await asyncio.to_thread(registry.find_key, id_of(text))
    assert record is not None, "it was made just now"
    # What may be kept on the way is kept by others.
    headers = {"cache-control": "no-store"}
    return Response({**describe(record), "key": text}, status_code=201, headers=headers)


async def _own(request: AnyRequest, key_id: str) -> KeyRecord:
    """Return a key that the caller may end. Raises KeyNotFound."""
    record = await asyncio.to_thread(services_of(request.app).registry.find_key, key_id)
    if record is None or not _owns(request.user, record):
        raise KeyNotFound(f"There is no key {key_id[:64]!r} here.")
    return record


def _owns(caller: Principal, key: KeyRecord) -> bool:
    return caller.is_operator or key.tenant == caller.tenant
