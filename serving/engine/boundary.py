"""The engine boundary: after resolution and tokenisation, before scheduling.

Token ids and an `AdapterRef` go in, token deltas come out. Nothing here knows torch, HTTP, names,
aliases or paths, so an engine can stand in this process, in another one, or be a scripted fake.

    EngineError (a WardrobeError: the command line shows it as one sentence)
    ├── EngineBusy              the waiting queue is full; try again in `retry_after` seconds
    ├── EngineUnavailable       draining, closed or dead
    ├── RequestRefused          this request can never run here (too long, rank over the bound)
    │   └── GrammarRefused      its grammar is wrong, too large, or takes too long to compile
    ├── AdapterLoadFailed       this adapter cannot be worn; other requests are not touched
    └── RequestFailed           this request failed while running; other requests are not touched
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from registry.adapter import AdapterRef
from registry.errors import WardrobeError

FinishReason = Literal["stop", "length"]
Priority = Literal["normal", "low"]


class EngineError(WardrobeError):
    """Base of everything an engine raises on purpose."""

    code = "engine_error"


class EngineBusy(EngineError):
    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class EngineUnavailable(EngineError):
    pass


class RequestRefused(EngineError):
    pass


class GrammarRefused(RequestRefused):
    pass


class AdapterLoadFailed(EngineError):
    pass


class RequestFailed(EngineError):
    pass


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole output must be: text that `source` describes.

    `json` is a JSON schema, `regex` an expression in the syntax of Rust's regex crate, and `lark`
    a grammar in llguidance's variant of Lark, which may embed both.
    """

    kind: Literal["json", "regex", "lark"]
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Bounds are checked by whoever builds it."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely ones
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    grammar: Grammar | None = None  # the output ends where the grammar does, with "stop"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to continue. Primitives only; no path and no name in it."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None  # None is the base model
    tenant: str = ""  # whose share of the engine this takes; empty for a check of its server's own
    priority: Priority = "normal"  # low takes what normal leaves, and delays nobody


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of the model's own distribution.

    Temperature, penalties, biases and grammars come after it and do not change it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """The tokens that one or more steps added. The last delta carries the finish reason.

    An end-of-text token that ends the sequence is counted in usage but not in `token_ids`
    of a delta with finish_reason "stop": there is nothing to show.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # as many as token_ids when asked for
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0  # sampled so far, an end-of-text token included
    cached_tokens: int = 0  # of the prompt, that did not have to be computed again


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of an adapter, in memory."""

    config: bytes
    weights: Sequence[bytes]  # in pieces


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter that sits in a slot now."""

    digest: str
    label: str
    running: int  # requests that wear it now


@dataclass(frozen=True, slots=True)
class LoadStage:
    """One part of bringing adapters into slots, all loads since the engine started together."""

    name: str  # fetch: to the disk; read: to host memory; place: into a slot
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; all counters count since the engine started."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    kv_block_tokens: int
    prefix_asked: int  # prompt tokens that were looked for in the prefix cache
    prefix_found: int
    prefix_bytes: int  # that it holds now
    prefix_bytes_total: int  # that it may hold
    adapter_slots: int  # adapters that can be in slots at once, if all are of the lowest rank
    adapter_memory: int  # bytes of all slots
    adapter_memory_used: int  # of those that hold an adapter
    resident: tuple[ResidentAdapter, ...]
    loading: tuple[AdapterRef, ...]  # that somebody waits for
    in_memory: int  # adapters in host memory that sit in no slot
    steps: int
    prompt_tokens: int
    generated_tokens: int
    aborted: int
    failed: int
    paused: int  # times that a running request gave its place to another tenant or class
    adapter_loads: int
    adapter_evictions: int
    load_stages: tuple[LoadStage, ...]
    device: str
    dtype: str
    operators: str  # what computes: "torch", or "C++" and its instructions; then why not better


class Engine(Protocol):
    """Runs requests of different adapters and of the base model in one batch."""

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one sequence, together."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        """Continue one sequence. Loads the adapter when it is not resident.

        Nothing is queued before the first `__anext__`. Closing the iterator (or cancelling the
        task that reads it) aborts the request; its slot and KV space are free within one step.
        Raises EngineBusy, EngineUnavailable, RequestRefused, AdapterLoadFailed, RequestFailed.
        """
        ...

    async def warm(self, adapter: AdapterRef) -> None:
        """Load the adapter into a slot. Idempotent; all or nothing; raises AdapterLoadFailed."""
        ...

    async def keep(self, adapter: AdapterRef) -> None:
        """Warm the adapter, and let nothing put it out of its slot until `release`. Idempotent.

        One slot stays for all others. Raises AdapterLoadFailed, also when no more can be kept.
        """
        ...

    def prefetch(self, adapter: AdapterRef, files: AdapterFiles) -> None:
        """Begin to read the adapter for who is about to ask for it, from its files in memory.

        The caller has seen that they hash to the digest. The latest one that was read so stays in
        host memory until it is asked for. For any thread. Waits for nothing and raises nothing;
        does nothing when as many as may be are on their way.
        """
        ...

    async def release(self, adapter: AdapterRef) -> None:
        """Let the slot of a kept adapter be used by others when they need it. Idempotent."""
        ...

    def check_room(self, tenant: str, priority: Priority = "normal") -> None:
        """Raise EngineBusy when `generate` would, for one more request of this tenant and class."""
        ...

    async def stats(self) -> EngineStats: ...

    async def check_health(self) -> None:
        """Raise EngineUnavailable when no step can run any more."""
        ...

    async def aclose(self) -> None:
        """End running requests with EngineUnavailable and release everything. Idempotent."""
        ...
