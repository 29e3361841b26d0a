"""Run a list of prompts to their ends: for evaluation and replay, where nobody streams."""

import asyncio
import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.adapter import AdapterRef
from registry.base import BaseModel
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from serving.engine.boundary import (
    Engine,
    EngineError,
    FinishReason,
    GenerateRequest,
    RequestFailed,
    SamplingParams,
    TokenLogprob,
)
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings

CONCURRENT = 64  # enough to fill a batch, few enough for any waiting queue


class OfflineEngines:
    """Answers lists of prompts on an engine of the model that is asked, kept for the next list.

    An engine takes its share of the whole machine, so there is one at a time: it ends when another
    model is asked, and with `close`.
    """

    def __init__(self, settings: EngineSettings | None = None) -> None:
        self._settings = settings
        self._engine: TorchEngine | None = None
        self._fingerprint = ""  # of the engine's model
        self._folders: dict[str, Path] = {}  # digest → adapter folder

    def close(self) -> None:
        if self._engine is not None:
            asyncio.run(self._engine.aclose())
        self._engine = None
        gc.collect()  # an engine refers to itself, and the next one divides the memory of both

    def answer(
        self,
        model: BaseModel,
        asks: Sequence[tuple[tuple[int, ...], Path | None]],
        max_new_tokens: int,
        done: Callable[[int], None],
    ) -> list[list[int]]:
        """Return the greedy continuation of every (prompt ids, adapter folder or None), in order.

        All are asked in one mixed batch; `done` hears how many have ended. An adapter is what is
        in its folder now, configuration and weights, whatever was there before.
        Raises what the engine raises; the requests that still run are aborted then.
        """
        refs = {folder: self._ref(folder) for _, folder in asks if folder is not None}
        pairs = [(prompt, refs[folder] if folder else None) for prompt, folder in asks]
        return generate_all(self._engine_of(model), pairs, max_new_tokens, done)

    def _ref(self, folder: Path) -> AdapterRef:
        digest = digest_adapter(folder)
        self._folders[digest] = folder
        return AdapterRef(digest, folder.name)

    def _engine_of(self, model: BaseModel) -> TorchEngine:
        if self._engine is None or self._fingerprint != model.fingerprint:
            self.close()
            self._engine = TorchEngine.create(model, self._fetch, self._settings)
            self._fingerprint = model.fingerprint
        return self._engine

    def _fetch(self, ref: AdapterRef) -> Path:
        return self._folders[ref.digest]


def digest_adapter(folder: Path) -> str:
    """Hash configuration and weights: the same matrices at another scale are another adapter."""
    hasher = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        data = (folder / name).read_bytes()
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Output:
    """What one request came to."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason


def generate_all(
    engine: Engine,
    asks: Sequence[tuple[tuple[int, ...], AdapterRef | None]],
    max_new_tokens: int,
    done: Callable[[int], None],
) -> list[list[int]]:
    """Return the greedy continuation of each (prompt, adapter), in order; `done` hears how many.

    Raises what the engine raises; the requests that still run are aborted then.
    """
    sampling = SamplingParams(max_tokens=max_new_tokens, temperature=0.0)
    requests = [
        GenerateRequest(f"offline-{number}", prompt, sampling, adapter)
        for number, (prompt, adapter) in enumerate(asks)
    ]
    outputs: dict[int, list[int]] = {}

    def each(number: int, output: Output | EngineError) -> None:
        if isinstance(output, EngineError):
            raise output
        outputs[number] = list(output.token_ids)
        done(len(outputs))

    asyncio.run(run_all(engine, requests, each))
    return [outputs[number] for number in range(len(requests))]


async def run_all(
    engine: Engine,
    requests: Sequence[GenerateRequest],
    each: Callable[[int, Output | EngineError], None],
) -> None:
    """Run requests in mixed batches; `each` hears what came of every one, by its number.

    What `each` raises ends everything: the requests that still run are aborted then.
    """
    limit = asyncio.Semaphore(CONCURRENT)

    async def one(number: int) -> None:
        async with limit:
            try:
                output = await _collect(engine, requests[number])
            except EngineError as error:
                output = error
        each(number, output)

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(len(requests)):
                group.create_task(one(number))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # the group has cancelled the others by now


async def _collect(engine: Engine, request: GenerateRequest) -> Output:
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    async for delta in engine.generate(request):
        token_ids += delta.token_ids
        logprobs += delta.logprobs
        if delta.finish_reason:
            return Output(tuple(token_ids), tuple(logprobs), delta.finish_reason)
    raise RequestFailed(f"the engine ended {request.request_id} without a finish reason")
