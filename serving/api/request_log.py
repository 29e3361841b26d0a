"""/v1/logs, and what goes into the request log."""

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from litestar import Request, get
from litestar.params import FromPath, FromQuery, QueryParameter

from serving.api.auth import declare
from serving.api.record import RequestRecord
from serving.api.schemas import ChatRequest, CompletionRequest, Message, SamplingFields
from serving.api.services import Services, parameters_of, services_of
from serving.logs.entry import Entry, Said, Transcript
from serving.logs.store import Logged, Wanted, ago
from serving.tenants.keys import LOGS, Principal
from serving.tokens import Tokens

MAX_PAGE = 1000
PARAMETERS = {"limit", "before", "adapter", "failed", "contents"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
AnyRequest = Request[Any, Any, Any]


@get("/v1/logs", opt=declare(LOGS))
async def list_logs(
    request: AnyRequest,
    limit: Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)] = 100,
    before: Annotated[int | None, QueryParameter(ge=1)] = None,
    adapter: Annotated[str | None, QueryParameter(max_length=128)] = None,
    failed: FromQuery[bool] = False,
    contents: FromQuery[bool] = False,
) -> dict[str, Any]:
    """Return the caller's latest requests, the latest first; `before` the `seq` of the last one."""
    parameters_of(request, PARAMETERS)
    wanted = Wanted(_tenant(request.user), adapter, failed=failed, with_contents=contents)
    logs = services_of(request.app).logs
    found = await asyncio.to_thread(logs.find, wanted, limit=limit, before=before)
    return {
        "object": "list",
        "data": [shown_to(request.user, logged, contents=contents) for logged in found],
        "has_more": len(found) == limit,
    }


@get("/v1/logs/{request_id:str}", opt=declare(LOGS))
async def get_log(request: AnyRequest, request_id: FromPath[str]) -> dict[str, Any]:
    """Return one request of the caller's, with what was said where that is kept."""
    logs = services_of(request.app).logs
    logged = await asyncio.to_thread(logs.get, request_id, _tenant(request.user))
    return shown_to(request.user, logged, contents=True)


def _tenant(principal: Principal) -> str | None:
    return None if principal.is_operator else principal.tenant


def shown_to(principal: Principal, logged: Logged, *, contents: bool) -> dict[str, Any]:
    """Return a line of the log. Of an adapter that is only shared, experiments stay blind."""
    facts = {"seq": logged.seq, **asdict(logged.entry)}
    owner = logged.entry.adapter.partition("/")[0]
    if logged.entry.experiment and not principal.is_operator and owner != principal.tenant:
        facts |= {"version": "", "digest": "", "arm": ""}
    if contents:
        facts["contents"] = logged.contents and asdict(logged.contents)
    return facts


def keep_what_is_said(services: Services, record: RequestRecord, fields: SamplingFields) -> None:
    """Begin a transcript, if the tenant wants one of this request."""
    if services.log_writer.keeps(record.tenant, record.request_id):
        transcript = record.transcript = Transcript(_said_in(fields, services.tokens))
        record.watchers.append(lambda piece: transcript.add(piece.index, piece.text))


def _said_in(fields: SamplingFields, tokens: Tokens) -> tuple[Said, ...]:
    if isinstance(fields, ChatRequest):
        return tuple(map(_said, fields.messages))
    assert isinstance(fields, CompletionRequest), "there are two kinds of inference request"
    texts = [p if isinstance(p, str) else tokens.decode(p) for p in fields.prompts]
    return tuple({"role": "prompt", "content": text} for text in texts)


def _said(message: Message) -> Said:
    said = {"role": message.role, "content": message.text}
    if message.tool_calls:
        said["tool_calls"] = msgspec.json.encode(message.tool_calls).decode()
    return said


def entry_of(record: RequestRecord, scope: Mapping[str, Any]) -> Entry:
    """Return the facts of a request that has ended. Nothing in them is the client's own text."""
    first, seconds = record.first_token, record.seconds
    return Entry(
        request_id=record.request_id,
        at=ago(timedelta(seconds=seconds)),
        tenant=record.tenant,
        method=record.method if record.method in METHODS else "other",
        route=scope.get("path_template", "none"),
        endpoint=record.endpoint,
        adapter=record.label.partition("@")[0],
        version=record.label,
        digest=record.digest,
        experiment=record.experiment,
        arm=record.arm,
        status=record.status,
        outcome=record.outcome,
        finish=",".join(record.finish_reasons),
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        first_token_ms=None if first is None else round(1000 * first, 1),
        ms=round(1000 * seconds, 1),
    )
