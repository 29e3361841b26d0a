"""/v1/adapters/…: an adapter's versions and aliases, and moving an alias, over HTTP."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
from litestar import Request, get, post, put
from litestar.params import FromPath
from msgspec import Meta

from registry.adapter import AdapterName, Version
from registry.errors import Conflict
from registry.records import AliasMove
from serving.api.auth import declare
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import read_json, services_of
from serving.tenants.access import require_own
from serving.tenants.keys import PROMOTE, READ

Reason = Annotated[str, Meta(min_length=1, max_length=2000)]
AnyRequest = Request[Any, Any, Any]
T = TypeVar("T")


class Promotion(msgspec.Struct, forbid_unknown_fields=True):
    """Where an alias is to point, and why."""

    version: Annotated[int, Meta(ge=1, le=999_999_999)]
    reason: Reason
    force: bool = False  # although its gate failed
    expected_generation: int | None = None  # refuse when somebody moved the alias meanwhile


class Undoing(msgspec.Struct, forbid_unknown_fields=True):
    """Why an alias goes back."""

    reason: Reason


@get("/v1/adapters/{namespace:str}/{name:str}", opt=declare(READ))
async def get_adapter(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Return the versions, oldest first, and the aliases."""
    registry = services_of(request.app).registry
    adapter = await _usable(request, namespace, name)
    versions = await asyncio.to_thread(registry.versions, adapter)
    aliases = await asyncio.to_thread(registry.aliases, adapter)
    return {
        "id": str(adapter),
        "object": "adapter",
        "versions": [_version(version) for version in versions],
        "aliases": {
            alias.alias: {"version": alias.number, "generation": alias.generation}
            for alias in aliases
        },
    }


@get("/v1/adapters/{namespace:str}/{name:str}/history", opt=declare(READ))
async def get_history(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str]
) -> dict[str, Any]:
    """Return who moved which alias, when and why; oldest first."""
    registry = services_of(request.app).registry
    adapter = await _usable(request, namespace, name)
    events = await asyncio.to_thread(registry.history, adapter)
    return {"object": "list", "data": [{**asdict(event), "name": str(adapter)} for event in events]}


@put("/v1/adapters/{namespace:str}/{name:str}/aliases/{alias:str}", opt=declare(PROMOTE))
async def promote(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str], alias: FromPath[str]
) -> dict[str, Any]:
    """Point an alias to a version. Running servers follow within a second."""
    registry = services_of(request.app).registry
    adapter = own_adapter(request, namespace, name)
    wanted = decode_body(await read_json(request), Promotion)

    def move() -> AliasMove:
        return registry.promote(
            adapter,
            wanted.version,
            alias=alias,
            reason=wanted.reason,
            actor=record_of(request.scope).tenant,
            force=wanted.force,
            expected_generation=wanted.expected_generation,
        )

    return _moved(await moving(move))


@post(
    "/v1/adapters/{namespace:str}/{name:str}/aliases/{alias:str}/rollback",
    opt=declare(PROMOTE),
    status_code=200,
)
async def rollback(
    request: AnyRequest, namespace: FromPath[str], name: FromPath[str], alias: FromPath[str]
) -> dict[str, Any]:
    """Point an alias back to where it was before its last promote."""
    registry = services_of(request.app).registry
    adapter = own_adapter(request, namespace, name)
    reason = decode_body(await read_json(request), Undoing).reason
    actor = record_of(request.scope).tenant
    move = partial(registry.rollback, adapter, alias=alias, reason=reason, actor=actor)
    return _moved(await moving(move))


def own_adapter(request: AnyRequest, namespace: str, name: str) -> AdapterName:
    """Return the adapter of a path that this caller may change. Raises AdapterNotFound."""
    adapter = AdapterName.parse(f"{namespace}/{name}")
    require_own(request.user, adapter)
    return adapter


async def _usable(request: AnyRequest, namespace: str, name: str) -> AdapterName:
    adapter = AdapterName.parse(f"{namespace}/{name}")
    await services_of(request.app).access.require_use(request.user, adapter)
    return adapter


def decode_body(body: bytes, shape: type[T]) -> T:
    """Raises RequestError naming the field that does not fit."""
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"The body does not fit: {error}.") from error


async def moving(move: Callable[[], T]) -> T:
    """Run a change off the loop. A gate that failed or a lost race is a 409."""
    try:
        return await asyncio.to_thread(move)
    except Conflict as error:
        raise RequestError(error.message, code=error.code, status=409) from error


def _moved(move: AliasMove) -> dict[str, Any]:
    alias = move.alias
    return {
        "object": "adapter.alias",
        "id": f"{alias.name}@{alias.alias}",
        "version": alias.number,
        "digest": f"sha256:{alias.digest}",
        "generation": alias.generation,
        "previous": move.previous,
        "moved": move.moved,
    }


def _version(version: Version) -> dict[str, Any]:
    return {
        "number": version.number,
        "digest": f"sha256:{version.digest}",
        "kind": version.kind,
        "base": version.base_id,
        "rank": version.rank,
        "bytes": version.size_bytes,
        "created_at": version.created_at,
        "gate_failures": version.gate_failures,
    }
