"""/v1/limits: what tenants may use, set by the operator, and what is left of it."""

import asyncio
from dataclasses import asdict, fields
from functools import partial
from typing import Annotated, Any

import msgspec
from litestar import Request, delete, get, patch
from litestar.params import FromPath
from msgspec import UNSET, Meta, UnsetType

from serving.api.adapters import decode_body
from serving.api.auth import declare
from serving.api.errors import RequestError
from serving.api.record import record_of
from serving.api.services import parameters_of, read_json, services_of
from serving.tenants.keys import ADMIN, READ
from serving.tenants.limit import EVERYBODY, MOST, Limit, Subject
from serving.tenants.tenants import require_tenant

AnyRequest = Request[Any, Any, Any]
Count = Annotated[int, Meta(ge=1, le=MOST)] | None | UnsetType
Text = Annotated[str, Meta(min_length=1, max_length=200)]


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """What is to be another limit; null takes one away, what is left out stays."""

    name: Text | None = None  # only under this name; without it, all that the tenant asks for
    requests_per_minute: Count = UNSET
    tokens_per_minute: Count = UNSET
    concurrent: Count = UNSET
    tokens_per_day: Count = UNSET
    tokens_per_month: Count = UNSET
    reason: Annotated[str, Meta(min_length=1, max_length=2000)] = "set over HTTP"

    @property
    def values(self) -> dict[str, int | None]:
        found = {field.name: getattr(self, field.name) for field in fields(Limit)}
        return {name: value for name, value in found.items() if value is not UNSET}


@get("/v1/limits", opt=declare(ADMIN, operator=True))
async def list_limits(request: AnyRequest) -> dict[str, Any]:
    """Return every limit that is set."""
    found = await asyncio.to_thread(services_of(request.app).meter.ledger.limits)
    return {"object": "list", "data": [_facts(subject, limit) for subject, limit in found.items()]}


@get("/v1/limits/{tenant:str}", opt=declare(READ))
async def get_limits(request: AnyRequest, tenant: FromPath[str]) -> dict[str, Any]:
    """Return a tenant's limits and what is left of them now, in all and under each name."""
    if not request.user.is_operator:
        request.user.require_tenant(tenant)
    whole = Subject.parse(tenant, None)
    meter = services_of(request.app).meter
    await asyncio.to_thread(meter.flush)
    found = await asyncio.to_thread(meter.ledger.limits, tenant)
    looked = [meter.balances.look(subject) for subject in {whole: None, **found}]
    return {"object": "list", "data": [standing.facts() for standing in looked]}


@patch("/v1/limits/{tenant:str}", opt=declare(ADMIN, operator=True))
async def set_limit(request: AnyRequest, tenant: FromPath[str]) -> dict[str, Any]:
    """Set limits of a tenant, or of `*` for each tenant without one of its own."""
    meter, wanted = services_of(request.app).meter, decode_body(await read_json(request), Change)
    if not wanted.values:
        raise RequestError("Nothing is set: name one or more limits, such as tokens_per_minute.")
    subject = Subject.parse(tenant, wanted.name)
    if subject.tenant != EVERYBODY:
        await asyncio.to_thread(require_tenant, services_of(request.app).registry, tenant)
    actor = record_of(request.scope).tenant
    change = partial(meter.ledger.set_limit, actor=actor, reason=wanted.reason)
    limit = await asyncio.to_thread(change, subject, wanted.values)
    await asyncio.to_thread(meter.flush)  # so that it is in force here at once
    return _facts(subject, limit)


@delete("/v1/limits/{tenant:str}", opt=declare(ADMIN, operator=True), status_code=200)
async def clear_limit(request: AnyRequest, tenant: FromPath[str]) -> dict[str, Any]:
    """Take a tenant's limit away; with `?name=` the one under a name."""
    subject = Subject.parse(tenant, parameters_of(request, {"name"}).get("name"))
    meter, actor = services_of(request.app).meter, record_of(request.scope).tenant
    clear = partial(meter.ledger.clear_limit, actor=actor, reason="cleared over HTTP")
    cleared = await asyncio.to_thread(clear, subject)
    await asyncio.to_thread(meter.flush)
    return {"object": "limit", "tenant": subject.tenant, "name": subject.name, "cleared": cleared}


def _facts(subject: Subject, limit: Limit) -> dict[str, Any]:
    return {"object": "limit", "tenant": subject.tenant, "name": subject.name, **asdict(limit)}
