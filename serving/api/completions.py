"""POST /v1/completions: raw prompts, as text or as token ids."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from litestar import Request, post
from litestar.types import ASGIApp

from serving.api.admission import admit, defaults_of, reserve
from serving.api.answer import Choice, Usage
from serving.api.auth import declare, everywhere
from serving.api.errors import RequestError
from serving.api.mirroring import mirror
from serving.api.plan import Plan, make_plan, room_for_answer
from serving.api.record import RequestRecord, record_of
from serving.api.schemas import CompletionRequest, RequestDecoder
from serving.api.sequence import Piece, PlacedLogprob
from serving.api.services import Services, read_json, services_of
from serving.engine.boundary import TokenLogprob
from serving.routing import Route
from serving.tenants.keys import INFER
from serving.tokens import Tokens

DEFAULT_MAX_TOKENS = 16  # as the OpenAI API has it

_DECODER = RequestDecoder.of(CompletionRequest)
_encode = msgspec.json.Encoder().encode


@post(everywhere("/v1/completions"), opt=declare(INFER), status_code=200)
async def completions(request: Request[Any, Any, Any]) -> ASGIApp:
    services = services_of(request.app)
    fields = _DECODER.decode(await read_json(request), defaults_of(request))
    record = record_of(request.scope)
    route = await admit(request, fields)
    plan = await _plan(services, fields, route, record)
    reserve(record, plan)
    plan = await mirror(services, record, plan, partial(_prompt_for, plan))
    shape = CompletionShape(services.tokens, plan, record.request_id, services.now())
    return services.answer(plan, shape)


async def _plan(
    services: Services, fields: CompletionRequest, route: Route, record: RequestRecord
) -> Plan:
    if route.only_prompt:
        raise RequestError(
            f"{route.shown_as} is a prompt without an adapter: it goes before the messages of a "
            "chat and has no place in a raw prompt. Use /v1/chat/completions.",
            param="model",
            code="prompt_version",
        )
    prompts = fields.prompts
    choices = len(prompts) * fields.n
    if choices > services.settings.max_choices:
        raise RequestError(
            f"{len(prompts)} prompts × n = {fields.n} are {choices} answers; one request may ask "
            f"for {services.settings.max_choices}.",
            param="prompt",
        )
    wanted = fields.max_tokens or DEFAULT_MAX_TOKENS
    context = services.engine.max_model_len
    encoded: list[list[int]] = []
    for prompt in prompts:
        ids = await _ids(services.tokens, prompt, context)
        room_for_answer(ids, wanted, context, "prompt")
        encoded.append(ids)
    return make_plan(
        fields,
        encoded,
        request_id=record.request_id,
        tenant=record.tenant,
        route=route,
        max_tokens=wanted,
        logprobs=fields.logprobs,
        vocab=services.tokens.vocab_size,
    )


async def _prompt_for(plan: Plan, other: Route) -> Sequence[int] | None:
    return None if other.only_prompt else plan.requests[0].prompt_ids


async def _ids(tokens: Tokens, prompt: str | list[int], context: int) -> list[int]:
    ids = await tokens.encode(prompt, context) if isinstance(prompt, str) else prompt
    if not ids:
        raise RequestError("`prompt` is empty: there is nothing to continue.", param="prompt")
    if max(ids) >= tokens.vocab_size:
        raise RequestError(
            f"`prompt`: token id {max(ids)} is not in the vocabulary, whose last id is "
            f"{tokens.vocab_size - 1}.",
            param="prompt",
        )
    return ids


class CompletionShape:
    """Writes `text_completion` objects; chunks have the same shape."""

    opening = b""

    def __init__(self, tokens: Tokens, plan: Plan, request_id: str, created: int) -> None:
        self._tokens = tokens
        self._logprobs = plan.requests[0].sampling.logprobs is not None
        self._common = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": created,
            "model": plan.route.shown_as,
            "system_fingerprint": plan.route.system_fingerprint,
        }
        self._head = b"data: " + _encode(self._common)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if plan.include_usage else b"]}\n\n"

    def event(self, piece: Piece) -> bytes:
        choice = self._choice(piece.index, piece.text, piece.logprobs, piece.finish_reason)
        return self._head + _encode(choice) + self._tail

    def usage_event(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n"

    def body(self, choices: list[Choice], usage: Usage) -> bytes:
        written = [
            self._choice(index, "".join(c.text), c.logprobs, c.finish_reason)
            for index, c in enumerate(choices)
        ]
        return _encode({**self._common, "choices": written, "usage": usage})

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[PlacedLogprob],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs_of(logprobs) if self._logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs_of(self, tokens: Sequence[PlacedLogprob]) -> dict[str, Any]:
        """Return the four parallel lists; `text_offset` counts from the start of the answer."""
        return {
            "tokens": [self._name(placed.token.token_id) for placed in tokens],
            "token_logprobs": [placed.token.logprob for placed in tokens],
            "top_logprobs": [self._top(placed.token) for placed in tokens],
            "text_offset": [placed.offset for placed in tokens],
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Name the most likely tokens, and the sampled one when it is not among them."""
        named = dict(token.top) | {token.token_id: token.logprob}
        return {self._name(token_id): logprob for token_id, logprob in named.items()}

    def _name(self, token_id: int) -> str:
        """Return a token's text; `bytes:\\xe6` for bytes that are none, so that names differ."""
        data = self._tokens.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
