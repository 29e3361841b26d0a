"""The question every new version answers before anybody else may ask it."""

import asyncio
import math
from collections.abc import Sequence

from registry.adapter import Version
from serving.engine.boundary import Engine, EngineBusy, EngineError, GenerateRequest, SamplingParams
from serving.prompt import put_before
from serving.tokens import ChatMessage, PromptTooLong, Tokens

BUSY_PAUSE_SECONDS = 0.1
PROMPT_IDS = (0, 1, 2, 3)  # ids that every vocabulary has; the answer only has to be finite
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=1)


class SelfCheckFailed(EngineError):
    """The version loads, and what it computes cannot be used."""


async def make_ready(
    engine: Engine, tokens: Tokens, version: Version, *, keep: bool = False
) -> None:
    """Load a version and check it, so that its first request finds it warm.

    With `keep` it keeps its slot until `Engine.release`, also when the check fails.
    Waits while the engine's queue is full. Raises what `self_check` raises.
    """
    while True:
        try:
            return await self_check(engine, tokens, version, keep=keep)
        except EngineBusy:
            # A full queue says nothing about the version; the caller's deadline still holds.
            await asyncio.sleep(BUSY_PAUSE_SECONDS)


async def self_check(engine: Engine, tokens: Tokens, version: Version, *, keep: bool) -> None:
    """Generate greedily behind a prompt, with the version's examples, and behind a single token.

    An engine computes the tokens of a prompt, side by side, in another way than single ones, as
    which those of an answer come. Both are asked for at once, and they load the version, too: one
    step computes both, the first one that the version is there for.

    Raises SelfCheckFailed, PromptTooLong or TemplateRefused when no request could get through its
    prompt, or what the engine raises.
    """
    prompt = await _prompt_ids(engine, tokens, version)
    try:
        async with asyncio.TaskGroup() as group:
            if keep and version.adapter is not None:  # a prompt alone has nothing to load
                group.create_task(engine.keep(version.adapter))
            asked = [
                group.create_task(_logprobs(engine, version, form, ids))
                for form, ids in (("prompt", prompt), ("single", prompt[:1]))
            ]
    except ExceptionGroup as failed:
        error = failed.exceptions[0]  # the others were cancelled for it
        raise error from error.__cause__
    found = [task.result() for task in asked]
    if not all(len(one) == 1 and math.isfinite(one[0]) for one in found):
        raise SelfCheckFailed(
            f"{version.ref.label} failed its self-check: a token behind a prompt and one behind a "
            f"single token came back with the log probabilities {found}, which must be one finite "
            "number each. Push a version that was trained without NaN or overflow."
        )


async def _logprobs(engine: Engine, version: Version, form: str, ids: Sequence[int]) -> list[float]:
    name = f"selfcheck-{version.digest[:12]}-{form}"
    request = GenerateRequest(name, tuple(ids), ONE_TOKEN, version.adapter)
    return [token.logprob async for delta in engine.generate(request) for token in delta.logprobs]


async def _prompt_ids(engine: Engine, tokens: Tokens, version: Version) -> Sequence[int]:
    if version.adapter is not None and not version.examples:
        return PROMPT_IDS
    asked = put_before([ChatMessage("user", "?")], version.system_prompt, version.examples)
    ids = await tokens.encode_chat(asked, engine.max_model_len)
    if len(ids) + 1 > engine.max_model_len:
        raise PromptTooLong(
            f"{version.ref.label} puts {len(ids)} tokens before every answer, and this server's "
            f"context is {engine.max_model_len} tokens. Push a version with fewer examples.",
            "messages",
        )
    return ids
