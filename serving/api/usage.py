"""GET /v1/usage: what was used, by hour, day or version, as JSON or CSV."""

import asyncio
from typing import Any, cast

from litestar import Request, Response, get

from serving.api.auth import declare
from serving.api.errors import RequestError
from serving.api.services import parameters_of, services_of
from serving.tenants.keys import READ
from serving.tenants.usage import By, Span, csv_of

PARAMETERS = {"from", "to", "by", "tenant", "format"}
BY = ("hour", "day", "version")
FORMATS = ("json", "csv")
CSV = "text/csv"


@get("/v1/usage", opt=declare(READ))
async def get_usage(request: Request[Any, Any, Any]) -> Response[Any]:
    """Return a tenant's own usage; the operator's keys see everybody's.

    What ended on this server before is in it; other servers are at most a quarter second late.
    """
    meter, asked = services_of(request.app).meter, parameters_of(request, PARAMETERS)
    span = Span.parse(asked.get("from"), asked.get("to"), meter.clock.period())
    by = cast("By", _one_of("by", asked.get("by", "day"), BY))
    default = "csv" if CSV in request.headers.get("accept", "") else "json"
    form = _one_of("format", asked.get("format", default), FORMATS)
    tenant = asked.get("tenant")
    if tenant != request.user.tenant and tenant is not None:
        request.user.require_operator()
    if not request.user.is_operator:
        tenant = request.user.tenant
    await asyncio.to_thread(meter.flush)
    rows = await asyncio.to_thread(meter.ledger.usage, span, by, tenant)
    if form == "csv":
        return Response(csv_of(rows), media_type=CSV)
    body = {
        "object": "list",
        "from": span.first,
        "to": span.last,
        "by": by,
        "data": [row.facts() for row in rows],
    }
    return Response(body)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise RequestError(f"`{name}` is {value[:40]!r}; it is one of {', '.join(known)}.")
    return value
