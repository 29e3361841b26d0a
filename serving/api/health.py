"""Liveness, readiness and metrics."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from litestar import Request, Response, get

from registry.adapter import AdapterName
from registry.errors import StoreUnavailable
from serving.api.auth import OPEN, declare
from serving.api.metrics import CONTENT_TYPE
from serving.api.models import served_names
from serving.api.services import Services, services_of
from serving.api.vllm_metrics import VllmCollector
from serving.engine.boundary import EngineUnavailable
from serving.tenants.access import owns
from serving.tenants.keys import READ, InvalidKey

Test = Callable[[AdapterName], bool]


@get("/health/live", opt=declare(OPEN), sync_to_thread=False)
def live() -> dict[str, str]:
    """The process answers. Says nothing about the engine."""
    return {"status": "live"}


@get("/health/ready", opt=declare(OPEN))
async def ready(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
    """200 when requests are taken, 503 when not. Anonymous callers get status and counts."""
    services = services_of(request.app)
    status, reason = await _status(services)
    body: dict[str, Any] = {
        "status": status,
        "live_aliases": len(services.live.versions),
        "failed_rollouts": len(services.live.failures) + len(services.endpoints.failures),
        "registry_stale": services.live.stale,
        "limits_shared": not services.meter.balances.problem,
    }
    if (visible := await _visible(services, request)) is not None:
        usable, own = visible
        body["reason"] = reason
        body["limits_problem"] = services.meter.balances.problem
        body["operators"] = (await services.engine.stats()).operators
        body["failures"] = [
            {
                "name": str(failure.name),
                "alias": failure.alias,
                "version": failure.number,
                "message": failure.sentence,
            }
            for failure in services.live.failures.values()
            if usable(failure.name)
        ] + [
            {"name": str(name), "alias": None, "version": None, "message": sentence}
            for name, sentence in services.endpoints.failures.items()
            if own(name)
        ]
    return Response(body, status_code=200 if status == "ready" else 503)


@get("/metrics", opt=declare(READ, operator=True))
async def metrics(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Our own metrics, and beside them vLLM's that gateways choose a server by."""
    services = services_of(request.app)
    stats = await services.engine.stats()
    on_disk = await asyncio.to_thread(services.registry.materialized)
    names = await asyncio.to_thread(served_names, services)
    vllm = VllmCollector(stats, services.base.id, names)
    text = services.metrics.render(stats, on_disk, vllm)
    return Response(text, media_type=CONTENT_TYPE)


async def _status(services: Services) -> tuple[str, str]:
    if services.drain.draining:
        return "draining", "the server is shutting down"
    try:
        await services.engine.check_health()
    except EngineUnavailable as error:
        return "unavailable", str(error)
    return "ready", ""


async def _visible(services: Services, request: Request[Any, Any, Any]) -> tuple[Test, Test] | None:
    """Return tests of the adapters and of the endpoints whose details this caller may read.

    A missing key, a bad one or a lost database means no details.
    """
    try:
        principal = await services.authentication.principal(request)
        if READ not in principal.scopes:
            return None
        return await services.access.usable(principal), partial(owns, principal)
    except (InvalidKey, StoreUnavailable):
        return None
