"""What the handlers work with, and how they get at it."""

import json
import sys
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from litestar import Litestar, Request
from litestar.types import ASGIApp

from registry.base import BaseModel
from registry.jsonfile import DuplicateKey, unique
from registry.store import Registry
from serving.api.answer import Answer, Shape
from serving.api.auth import Authentication
from serving.api.drain import Drain
from serving.api.errors import RequestError
from serving.api.metrics import Metrics
from serving.api.plan import Plan
from serving.api.settings import ServerSettings
from serving.endpoints import LiveEndpoints
from serving.engine.boundary import Engine
from serving.experiments.live import LiveExperiments
from serving.experiments.recorder import Recorder
from serving.experiments.store import Experiments
from serving.loaded import LoadedAdapters
from serving.logs.store import Logs
from serving.logs.writer import LogWriter
from serving.routing import LiveTable, Route, Router
from serving.shadow.live import LiveShadows
from serving.shadow.mirror import Mirror
from serving.shadow.store import Comparisons
from serving.tenants.access import Access
from serving.tenants.meter import Meter
from serving.tokens import Tokens

JSON = "application/json"
_UNIQUE = json.JSONDecoder(object_pairs_hook=unique)


@dataclass(frozen=True, slots=True)
class Services:
    """The object graph of one server."""

    settings: ServerSettings
    registry: Registry
    engine: Engine
    base: BaseModel
    tokens: Tokens
    router: Router
    access: Access
    live: LiveTable
    endpoints: LiveEndpoints
    loaded: LoadedAdapters
    store: Experiments
    experiments: LiveExperiments
    recorder: Recorder
    logs: Logs
    log_writer: LogWriter
    comparisons: Comparisons
    shadows: LiveShadows
    mirror: Mirror
    drain: Drain
    metrics: Metrics
    authentication: Authentication
    meter: Meter

    def now(self) -> int:
        return int(time.time())

    def answer(self, plan: Plan, shape: Shape) -> ASGIApp:
        headers = self._headers(plan.route)
        return Answer(self.engine, self.tokens, self.drain, self.metrics, plan, shape, headers)

    def _headers(self, route: Route) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-adapter", route.shown_as.encode())]
        if not route.blind:
            headers.append((b"x-adapter-digest", f"sha256:{route.fingerprint}".encode()))
        if route.endpoint:
            headers.append((b"x-endpoint", str(route.endpoint.name).encode()))
        if route.experiment:
            headers.append((b"x-experiment", route.experiment.encode()))
        if route.arm:
            headers.append((b"x-arm", route.arm.encode()))
        return [*headers, (b"x-registry-stale", b"1")] if self.live.stale else headers


def services_of(app: Litestar) -> Services:
    return app.state.services


def parameters_of(request: Request[Any, Any, Any], known: Set[str]) -> dict[str, str]:
    """Return what stands behind the `?` of the address. Raises RequestError for what is unknown."""
    asked = dict(request.query_params)
    if unknown := sorted(asked.keys() - known):
        raise RequestError(
            f"{unknown[0][:40]!r} is not known here; known are {', '.join(sorted(known))}.",
            param=unknown[0][:40],
        )
    return asked


async def read_json(request: Request[Any, Any, Any]) -> bytes:
    """Return the body. A page of another site cannot send this media type without asking first.

    Raises RequestError for another media type, and for a key that comes twice in one object.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != JSON:
        raise RequestError(
            f"The body's Content-Type is {media_type[:100]!r}; send {JSON}.",
            code="unsupported_media_type",
            status=415,
        )
    body = await request.body()
    _require_unique_keys(body)
    return body


def _require_unique_keys(body: bytes) -> None:
    """The decoders of fields would take the last one. What else is wrong they say better.

    A pass of its own, of 3 to 10 µs for a usual body: msgspec has no such check.
    """
    try:
        _UNIQUE.decode(body.decode())
    except DuplicateKey as error:
        key = error.key[:100]
        raise RequestError(
            f"{key!r} comes twice in one object of the body. Send it once.",
            param=key,
            code="duplicate_key",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return
    except ValueError as error:  # Python's bound, for which a decoder of fields has no word
        most = sys.get_int_max_str_digits()
        raise RequestError(
            f"The body has a whole number of more than {most} digits.", code="invalid_json"
        ) from error
