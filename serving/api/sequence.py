"""One or several engine requests as one stream of text pieces, in the order they happen."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from serving.detokenizer import Detokenizer
from serving.engine.boundary import (
    Engine,
    FinishReason,
    GenerateRequest,
    RequestFailed,
    TokenDelta,
    TokenLogprob,
)
from serving.stops import StopMatcher
from serving.tokens import Tokens


@dataclass(frozen=True, slots=True)
class PlacedLogprob:
    """A token's log probability, and where its text begins in the answer, in characters."""

    token: TokenLogprob
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to one choice. The last one of a choice carries its finish reason."""

    index: int
    text: str
    logprobs: tuple[PlacedLogprob, ...]
    finish_reason: FinishReason | None
    completion_tokens: int  # so far
    cached_tokens: int = 0  # of the prompt, that were not computed again
    token_ids: tuple[int, ...] = ()  # of this step; what a stop string cuts off is among them


class _Writer:
    """Turns the deltas of one sequence into pieces.

    A log probability comes with the first character of its token's text. So it waits while the
    text is held back, and is dropped with text that a stop string cuts off.
    """

    def __init__(
        self, index: int, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._held: deque[PlacedLogprob] = deque()
        self._tokens = 0
        self._written = 0  # characters that came out of the detokenizer
        self._shown = 0  # and of the matcher

    def write(self, delta: TokenDelta) -> Piece:
        text = ""
        for position, token_id in enumerate(delta.token_ids):
            if delta.logprobs:
                self._held.append(PlacedLogprob(delta.logprobs[position], self._written))
            added = self._detokenizer.push(token_id)
            self._tokens += 1
            self._written += len(added)
            text += added if self._tokens <= self._min_tokens else self._matcher.push(added)
            if self._matcher.stopped:
                return self._piece(delta, text, "stop")
        if delta.finish_reason is None:
            return self._piece(delta, text, None)
        self._tokens = delta.completion_tokens
        text += self._matcher.push(self._detokenizer.finish())
        if self._matcher.stopped:
            return self._piece(delta, text, "stop")
        return self._piece(delta, text + self._matcher.finish(), delta.finish_reason)

    def _piece(self, delta: TokenDelta, text: str, reason: FinishReason | None) -> Piece:
        self._shown += len(text)
        uncut = reason is not None and not self._matcher.stopped
        logprobs: list[PlacedLogprob] = []
        while self._held and (uncut or self._held[0].offset < self._shown):
            logprobs.append(self._held.popleft())
        counts = self._tokens, delta.cached_tokens
        return Piece(self._index, text, tuple(logprobs), reason, *counts, delta.token_ids)


async def sequence(
    engine: Engine,
    tokens: Tokens,
    request: GenerateRequest,
    stops: Sequence[str],
    index: int,
    shown: Sequence[str] = (),
) -> AsyncGenerator[Piece]:
    """Run one engine request. Closing this closes the engine's iterator, which aborts it.

    Control tokens are not text, but for those of `shown`. Stop strings are looked for in what
    comes after the first `min_tokens` tokens. Pieces may have no text while a character is
    unfinished or a stop string may have begun.
    """
    writer = _Writer(index, tokens.detokenizer(shown), stops, request.sampling.min_tokens)
    # The contract says that closing aborts; only a generator can be closed.
    deltas = cast("AsyncGenerator[TokenDelta]", engine.generate(request))
    async with aclosing(deltas):
        async for delta in deltas:
            piece = writer.write(delta)
            yield piece
            if piece.finish_reason:
                return
    raise RequestFailed(f"the engine ended {request.request_id} without a finish reason")


async def side_by_side(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """Merge streams. The first error ends all of them; closing this closes all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()  # bounded by max_tokens

    async def pump(stream: AsyncIterator[Piece]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait(piece)
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        unfinished = len(streams)
        while unfinished:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish_reason is not None
            yield piece
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for stream in streams:
            await stream.aclose()  # a pump that never started has not closed its stream
