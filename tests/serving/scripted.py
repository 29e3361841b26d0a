"""An engine that follows a script: small, real, deterministic, with a history.

It answers with its adapter's label, again and again, one byte-token a step, so that every answer
says who gave it. It honours the whole contract of `serving.engine.boundary`.
"""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from registry.adapter import AdapterRef
from serving.engine.boundary import (
    AdapterFiles,
    AdapterLoadFailed,
    EngineBusy,
    EngineStats,
    EngineUnavailable,
    FinishReason,
    GenerateRequest,
    LoadStage,
    Priority,
    RequestFailed,
    RequestRefused,
    ResidentAdapter,
    TokenDelta,
    TokenLogprob,
)

EOS_ID = 257
BASE_LABEL = "base"


def label_of(request: GenerateRequest) -> str:
    return request.adapter.label if request.adapter else BASE_LABEL


def repeat_label(request: GenerateRequest) -> Iterator[int]:
    """The label for ever; with a seed and heat its letters are shifted by the seed."""
    sampling = request.sampling
    shift = (sampling.seed or 0) % 7 if sampling.temperature else 0
    return (byte + shift for byte in itertools.cycle(f"{label_of(request)} ".encode()))


def says(text: str, *, end: bool = True) -> Callable[[GenerateRequest], Iterator[int]]:
    """A script that says one text whatever it is asked, and ends."""
    ids = [*text.encode(), *([EOS_ID] if end else [])]
    return lambda request: iter(ids)


@dataclass(slots=True)
class ScriptedEngine:
    """Everything that can go wrong in an engine can be asked for by name."""

    script: Callable[[GenerateRequest], Iterator[int]] = repeat_label
    step_seconds: float = 0.0
    max_model_len: int = 512
    max_running: int = 64
    max_waiting: int = 64
    load_seconds: float = 0.0
    unloadable: set[str] = field(default_factory=set[str])  # digests
    not_finite: set[str] = field(default_factory=set[str])  # digests whose answers are NaN
    fail_after: int | None = None  # tokens, then RequestFailed
    history: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    slots: int = 8
    kept: set[str] = field(default_factory=set[str])  # digests
    prefetched: list[tuple[str, AdapterFiles]] = field(
        default_factory=list[tuple[str, AdapterFiles]]
    )
    resident: dict[str, AdapterRef] = field(default_factory=dict[str, AdapterRef])
    asked: list[GenerateRequest] = field(default_factory=list[GenerateRequest])
    running: dict[str, GenerateRequest] = field(default_factory=dict[str, GenerateRequest])
    waiting: int = 0
    aborted: int = 0
    failed: int = 0
    generated: int = 0
    prompt_tokens: int = 0
    dead: str = ""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        self._admit(request)
        self.asked.append(request)
        self.waiting += 1
        try:
            while len(self.running) >= self.max_running:
                await asyncio.sleep(0.001)
                self._check_alive()
        except BaseException:
            self.aborted += 1
            raise
        finally:
            self.waiting -= 1
        self.running[request.request_id] = request
        self.history.append(("start", request.request_id))
        how = "abort"
        try:
            if request.adapter:
                await self.warm(request.adapter)
            self.prompt_tokens += len(request.prompt_ids)
            async for delta in self._run(request):
                if delta.finish_reason:
                    how = "end"
                yield delta
        except (RequestFailed, AdapterLoadFailed, EngineUnavailable):
            how = "fail"
            raise
        finally:
            del self.running[request.request_id]
            self.history.append((how, request.request_id))
            self.aborted += how == "abort"
            self.failed += how == "fail"

    async def _run(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        sampling = request.sampling
        for count, token_id in enumerate(self.script(request), start=1):
            await asyncio.sleep(self.step_seconds)
            self._check_alive()
            if self.fail_after is not None and count > self.fail_after:
                raise RequestFailed("the script says that this request fails here")
            self.generated += 1
            if token_id == EOS_ID and not sampling.ignore_eos and count > sampling.min_tokens:
                yield TokenDelta((), (), "stop", count)
                return
            finish: FinishReason | None = "length" if count == sampling.max_tokens else None
            yield TokenDelta((token_id,), self._logprobs(request, token_id), finish, count)
            if finish:
                return
        raise AssertionError("the script is shorter than max_tokens and has no end")

    def _logprobs(self, request: GenerateRequest, token_id: int) -> tuple[TokenLogprob, ...]:
        wanted = request.sampling.logprobs
        if wanted is None:
            return ()
        bad = request.adapter is not None and request.adapter.digest in self.not_finite
        logprob = math.nan if bad else -0.5
        top = tuple(((token_id + i) % 256, logprob - i) for i in range(wanted))
        return (TokenLogprob(token_id, logprob, top),)

    def _admit(self, request: GenerateRequest) -> None:
        self._check_alive()
        if len(request.prompt_ids) + request.sampling.max_tokens > self.max_model_len:
            raise RequestRefused(f"longer than {self.max_model_len} tokens")
        self.check_room(request.tenant)

    def check_room(self, tenant: str, priority: Priority = "normal") -> None:
        if len(self.running) >= self.max_running and self.waiting >= self.max_waiting:
            raise EngineBusy(f"{self.waiting} requests are waiting", retry_after=3)

    def _check_alive(self) -> None:
        if self.dead:
            raise EngineUnavailable(self.dead)

    async def warm(self, adapter: AdapterRef) -> None:
        if adapter.digest in self.resident:
            return
        await asyncio.sleep(self.load_seconds)
        if adapter.digest in self.unloadable:
            raise AdapterLoadFailed(f"{adapter.label} cannot be loaded: the script says so")
        self.resident[adapter.digest] = adapter
        self.history.append(("load", adapter.label))

    async def keep(self, adapter: AdapterRef) -> None:
        if len(self.kept | {adapter.digest}) >= self.slots:
            raise AdapterLoadFailed(f"{adapter.label} cannot be kept: one slot stays free")
        await self.warm(adapter)
        self.kept.add(adapter.digest)

    def prefetch(self, adapter: AdapterRef, files: AdapterFiles) -> None:
        self.prefetched.append((adapter.digest, files))

    async def release(self, adapter: AdapterRef) -> None:
        self.kept.discard(adapter.digest)

    async def stats(self) -> EngineStats:
        worn = [r.adapter.digest for r in self.running.values() if r.adapter]
        return EngineStats(
            running=len(self.running),
            waiting=self.waiting,
            max_running=self.max_running,
            max_waiting=self.max_waiting,
            kv_tokens_used=0,
            kv_tokens_total=self.max_model_len * self.max_running,
            kv_block_tokens=16,
            prefix_asked=self.prompt_tokens,
            prefix_found=0,
            prefix_bytes=0,
            prefix_bytes_total=0,
            adapter_slots=max(self.slots, len(self.resident)),
            adapter_memory=0,
            adapter_memory_used=0,
            resident=tuple(
                ResidentAdapter(ref.digest, ref.label, worn.count(ref.digest))
                for ref in self.resident.values()
            ),
            loading=(),
            in_memory=0,
            steps=self.generated,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
            aborted=self.aborted,
            failed=self.failed,
            paused=0,
            adapter_loads=len(self.resident),
            adapter_evictions=0,
            load_stages=(LoadStage("read", len(self.resident), self.load_seconds),),
            device="script",
            dtype="float32",
            operators="script",
        )

    async def check_health(self) -> None:
        self._check_alive()

    async def aclose(self) -> None:
        self.dead = self.dead or "the engine is closed"
        while self.running:  # noqa: ASYNC110  # a poll of an end that happens once
            await asyncio.sleep(0.001)
