"""The question every new version answers before anybody else may ask it."""

import math

from registry.adapter import AdapterRef
from serving.engine.boundary import Engine, EngineError, GenerateRequest, SamplingParams

TOKENS = 2  # one from the prompt, one from a decode step: both paths, and no more delay
PROMPT_IDS = (0, 1, 2, 3)  # ids that every vocabulary has; the answer only has to be finite


class SelfCheckFailed(EngineError):
    """The version loads, and what it computes cannot be used."""


async def self_check(engine: Engine, adapter: AdapterRef) -> None:
    """Generate a few greedy tokens. Raises SelfCheckFailed, or what the engine raises."""
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=1)
    request = GenerateRequest(f"selfcheck-{adapter.digest[:12]}", PROMPT_IDS, sampling, adapter)
    logprobs: list[float] = []
    async for delta in engine.generate(request):
        logprobs += [token.logprob for token in delta.logprobs]
    if len(logprobs) != TOKENS or not all(map(math.isfinite, logprobs)):
        raise SelfCheckFailed(
            f"{adapter.label} failed its self-check: {TOKENS} greedy tokens came back with the "
            f"log probabilities {logprobs}, which must be {TOKENS} finite numbers. "
            "Push a version that was trained without NaN or overflow."
        )
