"""The one table from what went wrong to what HTTP says, and the envelope it is said in.

    {"error": {"message", "type", "code", "param", "request_id"}}

The status decides which exception class the OpenAI clients raise.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException

from registry import errors as domain
from serving.api.record import record_of
from serving.api.request_error import RequestError
from serving.engine import boundary as engine
from serving.experiments.codec import ExperimentNotFound
from serving.experiments.design import DesignInvalid
from serving.experiments.feedback import FeedbackInvalid
from serving.experiments.layers import LayerNotFound
from serving.loaded import AdapterNotLoaded
from serving.logs.store import RequestNotLogged
from serving.routing import ModelNotLive
from serving.selfcheck import SelfCheckFailed
from serving.shadow.comparison import CandidateIsProduction, ComparisonInvalid
from serving.shadow.store import ComparisonNotFound
from serving.tenants.duration import DurationInvalid
from serving.tenants.keys import InvalidKey, ScopeMissing, ScopeUnknown, TenantNotFound
from serving.tenants.limit import LimitInvalid, LimitReached, NeverFits
from serving.tenants.redact import redact
from serving.tenants.usage import SpanInvalid, TooManyRows
from serving.tokens import PromptTooLong, TemplateRefused

log = logging.getLogger("wardrobe.errors")

INVALID = "invalid_request_error"
SERVER = "server_error"
UNAVAILABLE = "service_unavailable_error"
NOT_FOUND = "not_found_error"
RETRY_AFTER_SECONDS = 2


class Unavailable(domain.WardrobeError):
    """Not now: draining, or too many requests at once."""

    code = "unavailable"


class ClientGone(Exception):
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True)
class Rule:
    status: int
    type: str
    code: str = ""  # empty: the error's own
    param: str | None = None
    cure: str = ""  # what to do over HTTP, where the error itself knows a command at most


_VERSIONS = "GET /v1/adapters/NAMESPACE/NAME lists its versions and aliases."

# The nearest class in an error's ancestry decides.
TABLE: dict[type[Exception], Rule] = {
    RequestError: Rule(400, INVALID),
    InvalidKey: Rule(401, "authentication_error"),
    ScopeMissing: Rule(403, "permission_error"),
    PromptTooLong: Rule(400, INVALID),
    TemplateRefused: Rule(400, INVALID, param="messages"),
    domain.InvalidName: Rule(400, INVALID),
    DesignInvalid: Rule(400, INVALID),
    FeedbackInvalid: Rule(400, INVALID, param="value"),
    domain.NotFound: Rule(404, NOT_FOUND, param="model"),
    domain.AdapterNotFound: Rule(
        404, NOT_FOUND, "", "model", "GET /v1/models lists what there is."
    ),
    domain.VersionNotFound: Rule(404, NOT_FOUND, "", "model", _VERSIONS),
    domain.AliasNotFound: Rule(404, NOT_FOUND, "", "model", _VERSIONS),
    domain.BaseNotFound: Rule(404, NOT_FOUND, cure="Push to a server that runs this base."),
    ExperimentNotFound: Rule(404, NOT_FOUND, cure="GET /v1/experiments lists them."),
    LayerNotFound: Rule(404, NOT_FOUND, cure="PUT /v1/layers/NAMESPACE/NAME makes one."),
    domain.EndpointNotFound: Rule(404, NOT_FOUND, cure="GET /v1/endpoints lists them."),
    domain.KeyNotFound: Rule(404, NOT_FOUND, cure="GET /v1/keys lists them."),
    AdapterNotLoaded: Rule(404, NOT_FOUND, param="lora_name"),
    ScopeUnknown: Rule(400, INVALID, param="scopes"),
    DurationInvalid: Rule(400, INVALID),
    TenantNotFound: Rule(404, NOT_FOUND),
    ComparisonInvalid: Rule(400, INVALID, param="share"),
    CandidateIsProduction: Rule(400, INVALID, param="candidate"),
    ComparisonNotFound: Rule(404, NOT_FOUND, cure="POST to the adapter's /shadow begins one."),
    RequestNotLogged: Rule(404, NOT_FOUND, cure="GET /v1/logs lists what was asked."),
    domain.Refused: Rule(422, INVALID),
    domain.BaseMismatch: Rule(422, INVALID, param="model"),
    # The beginning of a digest that fits several versions. Not 409: clients send that again.
    domain.Conflict: Rule(400, INVALID, param="model"),
    domain.IntegrityError: Rule(503, UNAVAILABLE, param="model"),
    domain.StoreUnavailable: Rule(503, UNAVAILABLE),
    ModelNotLive: Rule(503, UNAVAILABLE, param="model"),
    Unavailable: Rule(503, UNAVAILABLE),
    LimitInvalid: Rule(400, INVALID),
    SpanInvalid: Rule(400, INVALID),
    TooManyRows: Rule(400, INVALID),
    NeverFits: Rule(400, INVALID, param="max_tokens"),
    LimitReached: Rule(429, "rate_limit_error"),
    engine.EngineBusy: Rule(429, "rate_limit_error", "engine_busy"),
    engine.EngineUnavailable: Rule(503, UNAVAILABLE, "engine_unavailable"),
    engine.RequestRefused: Rule(400, INVALID, "request_refused"),
    engine.AdapterLoadFailed: Rule(503, UNAVAILABLE, "adapter_load_failed", "model"),
    SelfCheckFailed: Rule(503, UNAVAILABLE, "adapter_load_failed", "model"),
    engine.RequestFailed: Rule(500, SERVER, "request_failed"),
    ClientGone: Rule(499, INVALID, "client_closed_request"),
}
UNFORESEEN = Rule(500, SERVER, "internal_error")

HTTP_CODES = {404: "route_not_found", 405: "method_not_allowed", 413: "request_too_large"}

# What is said of an address that leads nowhere, with its method.
_NOWHERE = {
    "route_not_found": "There is no {} here. Answers are POST /v1/chat/completions and "
    "/v1/completions, models GET /v1/models.",
    "method_not_allowed": "{} is no method of this address.",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as HTTP says it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def body(self, request_id: str) -> bytes:
        return msgspec.json.encode(
            {
                "error": {
                    "message": redact(self.message),
                    "type": self.type,
                    "code": self.code,
                    "param": self.param and redact(self.param),
                    "request_id": request_id,
                }
            }
        )


def failure_of(error: Exception) -> Failure:
    """Say an error in HTTP. What nobody foresaw is logged and told without its inside."""
    if isinstance(error, HTTPException):
        return _from_litestar(error)
    rule = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), UNFORESEEN)
    if rule is UNFORESEEN:
        log.error("unforeseen error", exc_info=error)
        message = "The server failed on this request. Its log has the reason under the request id."
        return Failure(rule.status, rule.type, rule.code, message)
    status = getattr(error, "status", rule.status)
    if isinstance(error, engine.AdapterLoadFailed) and isinstance(error.__cause__, domain.Refused):
        status = 422  # refused for good: trying again does not help
    code = rule.code or getattr(error, "code", "")
    param = getattr(error, "param", rule.param)
    message = f"{error} {rule.cure}".rstrip()
    return Failure(status, rule.type, code, message, param, _headers(status, error))


def _headers(status: int, error: Exception) -> dict[str, str]:
    if status == 401:
        return {"www-authenticate": 'Bearer realm="wardrobe"'}
    if status in (429, 503):
        return {"retry-after": str(getattr(error, "retry_after", RETRY_AFTER_SECONDS))}
    return {}


def _from_litestar(error: HTTPException) -> Failure:
    code = HTTP_CODES.get(error.status_code, "invalid_request")
    if error.status_code >= 500:
        log.error("unforeseen error", exc_info=error)
        code = UNFORESEEN.code
    kind = SERVER if error.status_code >= 500 else INVALID
    headers = _plain_headers(error.headers)
    message = error.detail
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        # Of parameters in the address; litestar's own sentence does not say which one.
        message = "; ".join(f"`{wrong['key']}`: {wrong['message']}" for wrong in error.extra)
    return Failure(error.status_code, kind, code, message, None, headers)


def _plain_headers(headers: Mapping[str, Any] | None) -> dict[str, str]:
    return {name.lower(): str(value) for name, value in (headers or {}).items()}


def respond_with_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Litestar's exception handler for everything."""
    record = record_of(request.scope)
    failure = failure_of(error)
    if failure.code in _NOWHERE:
        where = f"{request.method} {request.scope['path'][:200]!r}"
        failure = replace(failure, message=_NOWHERE[failure.code].format(where))
    record.outcome = failure.code
    return Response(
        failure.body(record.request_id),
        status_code=failure.status,
        headers=failure.headers,
        media_type="application/json",
    )
