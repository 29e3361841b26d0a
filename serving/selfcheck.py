"""The question every new version answers before anybody else may ask it."""

import asyncio
import math

from registry.adapter import Version
from serving.engine.boundary import Engine, EngineBusy, EngineError, GenerateRequest, SamplingParams
from serving.prompt import put_before
from serving.tokens import ChatMessage, PromptTooLong, Tokens

BUSY_PAUSE_SECONDS = 0.1
TOKENS = 2  # one from the prompt, one from a decode step: both paths, and no more delay
PROMPT_IDS = (0, 1, 2, 3)  # ids that every vocabulary has; the answer only has to be finite


class SelfCheckFailed(EngineError):
    """The version loads, and what it computes cannot be used."""


async def make_ready(engine: Engine, tokens: Tokens, version: Version) -> None:
    """Load a version and check it, so that its first request finds it warm.

    Waits while the engine's queue is full. Raises what `self_check` and `Engine.warm` raise.
    """
    while True:
        try:
            if version.adapter is not None:
                await engine.warm(version.adapter)
            return await self_check(engine, tokens, version)
        except EngineBusy:
            # A full queue says nothing about the version; the caller's deadline still holds.
            await asyncio.sleep(BUSY_PAUSE_SECONDS)


async def self_check(engine: Engine, tokens: Tokens, version: Version) -> None:
    """Generate a few greedy tokens, behind the version's examples where it has any.

    Raises SelfCheckFailed, PromptTooLong or TemplateRefused when no request could get through its
    prompt, or what the engine raises.
    """
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
    prompt = await _prompt_ids(engine, tokens, version)
    request = GenerateRequest(f"selfcheck-{version.digest[:12]}", prompt, sampling, version.adapter)
    logprobs: list[float] = []
    async for delta in engine.generate(request):
        logprobs += [token.logprob for token in delta.logprobs]
    if len(logprobs) != TOKENS or not all(map(math.isfinite, logprobs)):
        raise SelfCheckFailed(
            f"{version.ref.label} failed its self-check: {TOKENS} greedy tokens came back with the "
            f"log probabilities {logprobs}, which must be {TOKENS} finite numbers. "
            "Push a version that was trained without NaN or overflow."
        )


async def _prompt_ids(engine: Engine, tokens: Tokens, version: Version) -> tuple[int, ...]:
    if version.adapter is not None and not version.examples:
        return PROMPT_IDS
    asked = put_before([ChatMessage("user", "?")], version.system_prompt, version.examples)
    ids = await tokens.encode_chat(asked, engine.max_model_len)
    if len(ids) + TOKENS > engine.max_model_len:
        raise PromptTooLong(
            f"{version.ref.label} puts {len(ids)} tokens before every answer, and this server's "
            f"context is {engine.max_model_len} tokens. Push a version with fewer examples.",
            "messages",
        )
    return tuple(ids)
