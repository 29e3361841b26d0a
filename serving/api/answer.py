"""The answer to an inference request: one JSON body, or a stream of server-sent events.

Both run under a lifeline: when the client goes, or the drain cuts, the engine's iterators are
closed at once.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from litestar.types import Receive, Scope, Send

from serving.api.drain import Drain
from serving.api.errors import ClientGone, RequestError, failure_of
from serving.api.metrics import Metrics
from serving.api.plan import Plan
from serving.api.record import RequestRecord, record_of
from serving.api.sequence import Piece, PlacedLogprob, sequence, side_by_side
from serving.engine.boundary import Engine, GrammarRefused
from serving.tokens import Tokens

DONE = b"data: [DONE]\n\n"
_LINE_ENDS = "\x85\u2028\u2029"  # the others are control characters, which JSON escapes itself


@dataclass(slots=True)
class Choice:
    """One finished choice of an answer that is not streamed."""

    text: list[str] = field(default_factory=list[str])
    logprobs: list[PlacedLogprob] = field(default_factory=list[PlacedLogprob])
    finish_reason: str = ""


@dataclass(frozen=True, slots=True)
class PromptDetails:
    cached_tokens: int  # found in the prefix cache


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Shape(Protocol):
    """How chat and completions write the same things."""

    @property
    def opening(self) -> bytes:
        """The events before the first piece; may be empty."""
        ...

    def event(self, piece: Piece) -> bytes: ...

    def usage_event(self, usage: Usage) -> bytes: ...

    def body(self, choices: list[Choice], usage: Usage) -> bytes: ...


class Answer:
    """An ASGI app that generates and sends. Errors before the first byte are raised."""

    def __init__(
        self,
        engine: Engine,
        tokens: Tokens,
        drain: Drain,
        metrics: Metrics,
        plan: Plan,
        shape: Shape,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._drain = drain
        self._metrics = metrics
        self._plan = plan
        self._shape = shape
        self._headers = headers
        self._completion_tokens = [0] * len(plan.requests)
        self._cached_tokens = [0] * len(plan.requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            if self._plan.stream:
                await self._stream(record, receive, send)
            else:
                await self._whole(record, receive, send)
        except ClientGone:
            # The engine may have been at the prompt for long: who asks and leaves has used it.
            record.prompt_tokens = self._plan.prompt_tokens
            raise
        except GrammarRefused as error:  # before the first byte: every choice has the same grammar
            field = self._plan.grammar_field
            raise RequestError(str(error), param=field, code="grammar_refused") from error
        finally:
            record.completion_tokens = sum(self._completion_tokens)
            if record.completion_tokens:
                record.prompt_tokens = self._plan.prompt_tokens
                record.cached_tokens = self._cached()

    async def _whole(self, record: RequestRecord, receive: Receive, send: Send) -> None:
        choices = [Choice() for _ in self._plan.requests]
        async with self._drain.lifeline(receive), aclosing(self._pieces(record)) as pieces:
            async for piece in pieces:
                choice = choices[piece.index]
                choice.text.append(piece.text)
                choice.logprobs += piece.logprobs
                choice.finish_reason = piece.finish_reason or ""
        body = self._shape.body(choices, self._usage())
        length = (b"content-length", str(len(body)).encode())
        await self._start(send, [(b"content-type", b"application/json"), length])
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _stream(self, record: RequestRecord, receive: Receive, send: Send) -> None:
        started = False
        last = b""
        try:
            async with self._drain.lifeline(receive), aclosing(self._pieces(record)) as pieces:
                async for piece in pieces:
                    if not started:
                        # Only now: until the engine has answered, an error has its own status.
                        started = True
                        await self._start(send, _EVENT_STREAM)
                        await _send_events(send, self._shape.opening)
                    if piece.text or piece.logprobs or piece.finish_reason:
                        await _send_events(send, self._shape.event(piece))
            last = DONE
            if self._plan.include_usage:
                last = self._shape.usage_event(self._usage()) + DONE
        except ClientGone:
            if not started:
                raise
            record.outcome = "disconnect"
        except Exception as error:
            if not started:
                raise
            failure = failure_of(error)
            record.outcome = failure.code
            last = b"data: " + failure.body(record.request_id) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _pieces(self, record: RequestRecord) -> AsyncGenerator[Piece]:
        plan = self._plan
        shown = plan.control_tokens
        streams = [
            self._counted(sequence(self._engine, self._tokens, request, plan.stops, index, shown))
            for index, request in enumerate(plan.requests)
        ]
        previous: list[float] = [0.0] * len(streams)
        async with aclosing(side_by_side(streams)) as pieces:
            async for piece in pieces:
                now = time.monotonic()
                before, previous[piece.index] = previous[piece.index], now
                if before:
                    self._metrics.itl.observe(now - before)
                else:
                    self._metrics.ttft.observe(now - record.started)
                    record.first_token = record.first_token or now - record.started
                if piece.finish_reason:
                    record.finish_reasons.append(piece.finish_reason)
                for watch in record.watchers:
                    watch(piece)
                yield piece

    async def _counted(self, stream: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
        """Count where the engine gives: a choice whose turn to be sent never came was made too."""
        async with aclosing(stream):
            async for piece in stream:
                self._completion_tokens[piece.index] = piece.completion_tokens
                self._cached_tokens[piece.index] = piece.cached_tokens
                yield piece

    def _usage(self) -> Usage:
        completion = sum(self._completion_tokens)
        prompt = self._plan.prompt_tokens
        details = PromptDetails(self._cached())
        return Usage(prompt, completion, prompt + completion, details)

    def _cached(self) -> int:
        """Return how many prompt tokens were known before: what choices share is computed once."""
        counts, n = self._cached_tokens, self._plan.choices
        return sum(min(counts[first : first + n]) for first in range(0, len(counts), n))

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        message: Any = {
            "type": "http.response.start",
            "status": 200,
            "headers": [*headers, *self._headers],
        }
        await send(message)


_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: pass every event on at once
]


async def _send_events(send: Send, events: bytes) -> None:
    if events:
        body = _without_line_ends(events)
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _without_line_ends(events: bytes) -> bytes:
    """Escape what ends a line in Unicode, though neither in JSON nor in an event stream.

    Clients that read text by lines, such as httpx' `iter_lines`, would cut an event in two there.
    """
    if not events.isascii():
        for character in _LINE_ENDS:
            events = events.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return events
