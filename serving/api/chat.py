"""POST /v1/chat/completions, in the shapes of the OpenAI API."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from litestar import Request, post
from litestar.types import ASGIApp

from serving.api.admission import admit, defaults_of, reserve
from serving.api.answer import Choice, Usage
from serving.api.auth import declare, everywhere
from serving.api.calls import delta_of, finish_reason, message_of
from serving.api.mirroring import mirror
from serving.api.plan import Plan, make_plan, room_for_answer
from serving.api.record import RequestRecord, record_of
from serving.api.schemas import ChatRequest, RequestDecoder
from serving.api.sequence import Piece, PlacedLogprob
from serving.api.services import Services, read_json, services_of
from serving.api.tools import call_of, toolbox_of
from serving.calls import CallParser
from serving.prompt import put_before
from serving.routing import Route
from serving.tenants.keys import INFER
from serving.tokens import ChatMessage, Tokens

_DECODER = RequestDecoder.of(ChatRequest)
_encode = msgspec.json.Encoder().encode


@post(everywhere("/v1/chat/completions"), opt=declare(INFER), status_code=200)
async def chat_completions(request: Request[Any, Any, Any]) -> ASGIApp:
    services = services_of(request.app)
    fields = _DECODER.decode(await read_json(request), defaults_of(request))
    record = record_of(request.scope)
    route = await admit(request, fields)
    plan = await _plan(services, fields, route, record)
    reserve(record, plan)
    plan = await mirror(services, record, plan, partial(_prompt_for, services, fields, plan))
    shape = ChatShape(services.tokens, plan, record.request_id, services.now())
    return services.answer(plan, shape)


async def _plan(
    services: Services, fields: ChatRequest, route: Route, record: RequestRecord
) -> Plan:
    context = services.engine.max_model_len
    toolbox = toolbox_of(fields, services.tokens)
    tools = toolbox.tools if toolbox else ()
    messages = messages_of(fields, route)
    prompt = await services.tokens.encode_chat(messages, context, tools)
    asked = fields.max_completion_tokens or fields.max_tokens
    default = min(context - len(prompt), services.settings.default_max_tokens)
    wanted = asked or max(default, 1)
    before = f"{route.shown_as} puts {len(route.examples)} examples before your messages. "
    note = before if route.examples else ""
    room_for_answer(prompt, wanted, context, "messages", note)
    return make_plan(
        fields,
        [prompt],
        request_id=record.request_id,
        tenant=record.tenant,
        route=route,
        max_tokens=wanted,
        logprobs=fields.top,
        vocab=services.tokens.vocab_size,
        toolbox=toolbox,
    )


async def _prompt_for(
    services: Services, fields: ChatRequest, plan: Plan, other: Route
) -> Sequence[int]:
    """Return the same messages behind another version's own prompt."""
    other = other.behind(plan.route.endpoint)
    if (other.system_prompt, other.examples) == (plan.route.system_prompt, plan.route.examples):
        return plan.requests[0].prompt_ids
    tools = plan.toolbox.tools if plan.toolbox else ()
    context = services.engine.max_model_len
    return await services.tokens.encode_chat(messages_of(fields, other), context, tools)


def messages_of(fields: ChatRequest, route: Route) -> list[ChatMessage]:
    """Return the messages after the version's own prompt.

    `developer` is the newer name of `system`; base models know only the older one.
    """
    roles = {"developer": "system"}
    messages = [
        ChatMessage(
            roles.get(m.role, m.role),
            m.text,
            tuple(map(call_of, m.tool_calls or ())),
            m.tool_call_id or "",
        )
        for m in fields.messages
    ]
    return put_before(messages, route.system_prompt, route.examples)


class ChatShape:
    """Writes `chat.completion` objects and their chunks."""

    def __init__(self, tokens: Tokens, plan: Plan, request_id: str, created: int) -> None:
        self._tokens = tokens
        self._logprobs = plan.requests[0].sampling.logprobs is not None
        self._parsers: list[CallParser] = []  # one for each choice
        if plan.toolbox is not None:
            self._parsers = [plan.toolbox.parser() for _ in plan.requests]
        self._common = {
            "id": f"chatcmpl-{request_id}",
            "created": created,
            "model": plan.route.shown_as,
            "system_fingerprint": plan.route.system_fingerprint,
        }
        chunk = _encode({**self._common, "object": "chat.completion.chunk"})
        # Everything of an event but its choice is the same for all events: encoded once.
        self._head = b"data: " + chunk[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"
        self.opening = b"".join(map(self._opening, range(len(plan.requests))))

    def event(self, piece: Piece) -> bytes:
        deltas, called = self._deltas(piece)
        logprobs = self._logprobs_of(piece.logprobs)
        events = b""
        for delta in deltas:
            events += self._event(piece.index, delta, logprobs)
            logprobs = None  # they stand beside the first thing that they say
        if piece.finish_reason:
            events += self._event(piece.index, {}, None, finish_reason(piece.finish_reason, called))
        return events

    def _deltas(self, piece: Piece) -> tuple[list[dict[str, Any]], bool]:
        """Return what this piece adds to its message, and whether the message has calls."""
        text = {"content": piece.text}
        if not self._parsers:
            return ([text] if piece.text or piece.logprobs else []), False
        parser = self._parsers[piece.index]
        found = parser.push(piece.text)
        if piece.finish_reason:
            found += parser.finish()
        deltas = [delta_of(event) for event in found]
        return deltas or ([{"content": ""}] if piece.logprobs else []), parser.calls > 0

    def usage_event(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def body(self, choices: list[Choice], usage: Usage) -> bytes:
        return _encode(
            {
                **self._common,
                "object": "chat.completion",
                "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
                "usage": usage,
            }
        )

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(choice.text),
            "refusal": None,
        }
        if self._parsers:
            parser = self._parsers[index]
            message |= message_of([*parser.push(message["content"]), *parser.finish()])
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_of(choice.logprobs),
            "finish_reason": finish_reason(choice.finish_reason, "tool_calls" in message),
        }

    def _opening(self, index: int) -> bytes:
        content = None if self._parsers else ""  # there may be calls and no text
        return self._event(index, {"role": "assistant", "content": content}, None)

    def _event(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Any,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._head + _encode(choice) + self._tail

    def _logprobs_of(self, tokens: Sequence[PlacedLogprob]) -> Any:
        if not self._logprobs:
            return None
        content = [
            {
                **self._token(placed.token.token_id, placed.token.logprob),
                "top_logprobs": [self._token(*top) for top in placed.token.top],
            }
            for placed in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokens.token_text(token_id),
            "bytes": list(self._tokens.token_bytes(token_id)),
            "logprob": logprob,
        }
