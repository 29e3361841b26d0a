"""One or several engine requests as one stream of text pieces, in the order they happen."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

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
class Piece:
    """What one step added to one choice. The last one of a choice carries its finish reason."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    completion_tokens: int  # so far


async def sequence(
    engine: Engine, tokens: Tokens, request: GenerateRequest, stops: Sequence[str], index: int
) -> AsyncGenerator[Piece]:
    """Run one engine request. Closing this closes the engine's iterator, which aborts it.

    Stop strings are looked for in what comes after the first `min_tokens` tokens. Pieces may
    have no text while a character is unfinished or a stop string may have begun.
    """
    detokenizer = tokens.detokenizer()
    matcher = StopMatcher(stops)
    min_tokens = request.sampling.min_tokens
    count = 0
    # The contract says that closing aborts; only a generator can be closed.
    deltas = cast("AsyncGenerator[TokenDelta]", engine.generate(request))
    async with aclosing(deltas):
        async for delta in deltas:
            text = ""
            for position, token_id in enumerate(delta.token_ids, start=1):
                count += 1
                added = detokenizer.push(token_id)
                text += added if count <= min_tokens else matcher.push(added)
                if matcher.stopped:
                    yield Piece(index, text, delta.logprobs[:position], "stop", count)
                    return
            if delta.finish_reason is None:
                yield Piece(index, text, delta.logprobs, None, count)
                continue
            reason = delta.finish_reason
            text += matcher.push(detokenizer.finish())
            if matcher.stopped:
                reason = "stop"
            else:
                text += matcher.finish()
            yield Piece(index, text, delta.logprobs, reason, delta.completion_tokens)
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
