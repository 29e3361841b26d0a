"""Run a list of prompts to their ends on an engine: for evaluation, where nobody streams."""

import asyncio
from collections.abc import Callable, Sequence

from registry.adapter import AdapterRef
from serving.engine.boundary import Engine, GenerateRequest, SamplingParams

CONCURRENT = 64  # enough to fill a batch, few enough for any waiting queue


def generate_all(
    engine: Engine,
    adapter: AdapterRef | None,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    done: Callable[[int], None],
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, in order; `done` hears how many are.

    Raises what the engine raises; the requests that still run are aborted then.
    """

    async def run() -> list[list[int]]:
        limit = asyncio.Semaphore(CONCURRENT)
        finished = 0

        async def one(number: int, prompt: tuple[int, ...]) -> list[int]:
            nonlocal finished
            sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
            request = GenerateRequest(f"offline-{number}", prompt, sampling, adapter)
            async with limit:
                output = [t async for delta in engine.generate(request) for t in delta.token_ids]
            finished += 1
            done(finished)
            return output

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the group has cancelled the others by now
        return [task.result() for task in tasks]

    return asyncio.run(run())
