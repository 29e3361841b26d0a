"""Small things the engine's tests share: a base, folders of adapters, and a way to run requests."""

import asyncio
import hashlib
import json
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from registry.adapter import AdapterRef
from registry.base import BaseModel
from serving.engine.boundary import (
    Engine,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Grammar,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)
from serving.engine.build import Parts
from serving.engine.sampler import Sampler
from serving.engine.sequence import Sequence as Running
from tests import tiny


def base_of(folder: Path) -> BaseModel:
    return BaseModel(id="tiny", path=folder, fingerprint="", structure="", linears={})


class Folders:
    """Adapters by digest, as a registry would hand them out; counts how often it was asked."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.refs = {
            name: AdapterRef(hashlib.sha256(name.encode()).hexdigest(), f"tiny/{name}@v1")
            for name in folders
        }
        self.folders = {self.refs[name].digest: folder for name, folder in folders.items()}
        self.asked: list[str] = []

    def __call__(self, ref: AdapterRef) -> Path:
        self.asked.append(ref.digest)
        return self.folders[ref.digest]


@dataclass(frozen=True)
class Result:
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish: FinishReason | None
    completion_tokens: int


def request(
    prompt: Sequence[int] | str, adapter: AdapterRef | None = None, **sampling: Any
) -> GenerateRequest:
    ids = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
    params = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | sampling))
    return GenerateRequest(f"r{id(params)}", ids, params, adapter)


def schema(value: Any) -> Grammar:
    return Grammar("json", json.dumps(value))


def text(result: Result) -> str:
    return bytes(token for token in result.tokens if token < 256).decode()


def stepped(parts: Parts) -> threading.Semaphore:
    """Let an engine that is built of these end no more steps than there are permits."""
    permits = threading.Semaphore(0)

    class Stepped(Sampler):
        def choose(self, logits: torch.Tensor, sequences: Sequence[Running]) -> Any:
            permits.acquire()
            return super().choose(logits, sequences)

    sampler = parts.core.sampler
    parts.core.sampler = Stepped(sampler.greedy, frozenset(sampler.eos_ids))
    return permits


def stream(engine: Engine, wanted: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
    """Return the iterator as what it is, so that it can be closed."""
    return cast("AsyncGenerator[TokenDelta, None]", engine.generate(wanted))


async def complete(engine: Engine, wanted: GenerateRequest) -> Result:
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    last: TokenDelta | None = None
    async for last in engine.generate(wanted):
        tokens += last.token_ids
        logprobs += last.logprobs
    assert last is not None
    return Result(tokens, logprobs, last.finish_reason, last.completion_tokens)


async def complete_all(
    engine: Engine, wanted: Sequence[GenerateRequest]
) -> list[Result | BaseException]:
    return await asyncio.gather(
        *(complete(engine, each) for each in wanted), return_exceptions=True
    )


def wait_for_pages() -> None:
    """Wait until no memory is being made ready in this process."""
    while any(thread.name == "pages-ahead" for thread in threading.enumerate()):
        time.sleep(0.01)


async def until(engine: Engine, seen: Callable[[EngineStats], bool]) -> EngineStats:
    """Wait until the engine's own figures show it; give up after ten seconds."""
    async with asyncio.timeout(10):
        while not seen(stats := await engine.stats()):  # noqa: ASYNC110  # an engine tells nobody
            await asyncio.sleep(0.001)
    return stats


def run_all(engine: Engine, wanted: Sequence[GenerateRequest]) -> list[Result]:
    """Run the requests together; every one must succeed. Closes the engine."""

    async def main() -> list[Result | BaseException]:
        try:
            return await complete_all(engine, wanted)
        finally:
            await engine.aclose()

    results = asyncio.run(main())
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[Result]", results)


def mixed_requests(
    names: Sequence[str | None], folders: Folders, rng: random.Random, tokens: int
) -> list[GenerateRequest]:
    """Return a random prompt for each name, which wears that adapter, or none."""
    return [
        request(
            [rng.randrange(256) for _ in range(rng.randint(1, 40))],
            folders.refs[name] if name else None,
            max_tokens=tokens,
            logprobs=5,
        )
        for name in names
    ]


class Oracle:
    """transformers and PEFT, one request at a time, the adapter in the base's number format."""

    def __init__(
        self, base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        if adapter is not None:
            with tiny.peft_on_new_transformers():
                self.model = PeftModel.from_pretrained(
                    self.model, str(adapter), autocast_adapter_dtype=False
                )
        self.model.eval()

    @torch.inference_mode()
    def logprobs(self, ids: Sequence[int]) -> torch.Tensor:
        """Return log-probabilities [len(ids), vocab] of what follows each position."""
        # Some adapters have positions before the prompt.
        logits = self.model(torch.tensor([list(ids)])).logits[0, -len(ids) :]
        return torch.log_softmax(logits.float(), dim=-1)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logprobs(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def likeliest(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Return the most likely token in the place of each: `tokens`, if they are the greedy ones.

        Much cheaper than `greedy`.
        """
        table = self.logprobs([*prompt, *tokens])
        return table[len(prompt) - 1 : -1].argmax(dim=-1).tolist()

    def largest_error(self, prompt: Sequence[int], result: Result) -> float:
        """Return the largest difference of any reported log-probability from the oracle's."""
        table = self.logprobs([*prompt, *result.tokens])
        errors = [0.0]
        for i, entry in enumerate(result.logprobs):
            row = table[len(prompt) - 1 + i]
            for token, value in (*entry.top, (entry.token_id, entry.logprob)):
                errors.append(abs(float(row[token]) - value))
        return max(errors)

    def distance(self, other: "Oracle", prompt: Sequence[int], result: Result) -> float:
        """Return the largest difference from another oracle where a result was written.

        As in a result it is that of the most likely tokens.
        """
        own, others = (each.logprobs([*prompt, *result.tokens]) for each in (self, other))
        written = slice(len(prompt) - 1, -1)
        likely = own[written].topk(5).indices
        return float((own - others)[written].gather(1, likely).abs().max())
