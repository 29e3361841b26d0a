"""Runs prompts of old through production and a candidate, before anybody is served by it.

Both versions answer greedily, in the same mixed batches, with the same bound on the answer. What
is done is kept: the same replay goes on where it was.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from registry.adapter import AdapterName, Selector
from registry.base import BaseModel
from registry.database import now
from registry.store import Registry
from registry.whole import refuse_whole
from serving.engine.boundary import (
    Engine,
    EngineError,
    EngineUnavailable,
    GenerateRequest,
    SamplingParams,
)
from serving.engine.budgets import within_memory
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from serving.experiments.experiment import Arm
from serving.offline import Output, run_all
from serving.prompt import put_before
from serving.routing import Route
from serving.shadow.asks import Ask, Source
from serving.shadow.comparison import Comparison, replay_id
from serving.shadow.mirror import TOP_LOGPROBS
from serving.shadow.moves import pin
from serving.shadow.pair import Pair, Side, compare
from serving.shadow.store import Comparisons
from serving.tokens import PromptTooLong, TemplateRefused, Tokens

SAVE_EVERY = 16  # pairs in one transaction
RUNNING = 8  # at once: a quarter of what a server runs
PART = 4


def replay_all(
    registry: Registry,
    store: Comparisons,
    name: AdapterName,
    candidate: str,
    source: Source,
    max_tokens: int,
    actor: str,
    done: Callable[[int, int], None],
) -> tuple[Comparison, dict[str, int]]:
    """Replay on an engine of its own; return the comparison, and what made no pair, by why.

    Raises what `pin` raises, and EngineUnavailable.
    """
    arms = pin(registry, name, candidate)
    base = registry.bases.get(registry.resolve(Selector(name, number=arms[0].number)).base_id)
    comparison = store.begin_replay(
        Comparison(
            id=replay_id(*arms, source.name, max_tokens),
            kind="replay",
            name=name,
            production=arms[0],
            candidate=arms[1],
            share=1.0,
            salt="",
            state="running",
            reason="",
            actor=actor,
            created_at=now(),
            ended_at=None,
        )
    )
    with closing(Tokens(base.path)) as tokens:
        engine = TorchEngine.create(base, registry.find_files, settings_beside_server(base))
        try:
            routes = [_route(registry, arm, base) for arm in arms]
            replay = Replay(comparison, store, engine, tokens, routes, max_tokens)
            skipped = replay.run(source.asks, done)
            if source.tools:
                skipped["tools"] = source.tools
        finally:
            asyncio.run(engine.aclose())
    return store.stop(comparison, "done"), skipped


def settings_beside_server(base: BaseModel) -> EngineSettings:
    """Return how a replay's engine runs: a server may have its share of the same memory.

    It takes a quarter of what it would take alone, for a quarter of the sequences. Adapters are two
    at most, and take memory as they come. Raises EngineUnavailable.
    """
    alone = within_memory(base, EngineSettings(max_running=RUNNING))
    parts = ("kv_cache_bytes", "prefix_cache_bytes", "loading_memory")
    sizes = {name: getattr(alone, name) for name in parts}
    return replace(alone, **{name: size and max(1, size // PART) for name, size in sizes.items()})


def _route(registry: Registry, arm: Arm, base: BaseModel) -> Route:
    if arm.name is None:
        return Route(base.id, base.fingerprint)
    version = registry.resolve(Selector(arm.name, number=arm.number))
    refuse_whole(version)
    return Route.to(version)


class Replay:
    """One replay on an engine, which has both versions."""

    def __init__(
        self,
        comparison: Comparison,
        store: Comparisons,
        engine: Engine,
        tokens: Tokens,
        routes: Sequence[Route],  # production's and the candidate's
        max_tokens: int,
    ) -> None:
        self._comparison = comparison
        self._store = store
        self._engine = engine
        self._tokens = tokens
        self._routes = routes
        self._max_tokens = max_tokens
        self._found: list[Pair] = []
        self._missed: Counter[str] = Counter()

    def run(self, asks: Sequence[Ask], done: Callable[[int, int], None]) -> dict[str, int]:
        """Ask both versions everything that has no pair yet; `done` hears (asks done, asks).

        Returns how many made no pair, by why. Interrupted, it keeps the pairs that it has.
        Raises EngineUnavailable.
        """
        known = self._store.keys(self._comparison)
        left = [ask for ask in asks if ask.key not in known]
        finished = len(asks) - len(left)
        done(finished, len(asks))
        try:
            asyncio.run(self._run(left, lambda more: done(finished + more, len(asks))))
        finally:
            self._save()
        return dict(self._missed)

    async def _run(self, asks: Sequence[Ask], done: Callable[[int], None]) -> None:
        requests: list[GenerateRequest] = []
        waiting: list[Ask] = []
        for ask in asks:
            if both := await self._requests(ask):
                requests += both
                waiting.append(ask)
        answers: dict[int, Output | EngineError] = {}
        ended = len(asks) - len(waiting)

        def each(number: int, output: Output | EngineError) -> None:
            nonlocal ended
            if isinstance(output, EngineUnavailable):
                raise output
            answers[number] = output
            first = number - number % 2
            if first in answers and first + 1 in answers:
                self._take(waiting[first // 2], answers.pop(first), answers.pop(first + 1))
                ended += 1
                done(ended)

        await run_all(self._engine, requests, each)

    async def _requests(self, ask: Ask) -> list[GenerateRequest] | None:
        """Return production's request and the candidate's, with one bound; None without room."""
        context = self._engine.max_model_len
        try:
            prompts = [await self._ids(ask, route) for route in self._routes]
        except (PromptTooLong, TemplateRefused):
            self._missed["unfit"] += 1
            return None
        if None in prompts:
            self._missed["raw"] += 1
            return None
        both = [ids for ids in prompts if ids is not None]
        room = min(self._max_tokens, context - max(map(len, both)))
        if room < 1 or not all(both):
            self._missed["unfit"] += 1
            return None
        return [
            GenerateRequest(
                f"{ask.key}-{side}",
                tuple(ids),
                SamplingParams(max_tokens=room, temperature=0.0, logprobs=side * TOP_LOGPROBS),
                route.adapter,
            )
            for side, (ids, route) in enumerate(zip(both, self._routes, strict=True))
        ]

    async def _ids(self, ask: Ask, route: Route) -> list[int] | None:
        context = self._engine.max_model_len
        if ask.raw is not None:
            return None if route.only_prompt else await self._tokens.encode(ask.raw, context)
        messages = put_before(ask.messages, route.system_prompt, route.examples)
        return await self._tokens.encode_chat(messages, context)

    def _take(
        self, ask: Ask, production: Output | EngineError, candidate: Output | EngineError
    ) -> None:
        if isinstance(production, EngineError):
            self._missed["unfinished"] += 1
        elif isinstance(candidate, EngineError):
            self._found.append(Pair(self._comparison.id, ask.key, ask.key, failed=True))
        else:
            sides = self._side(production), self._side(candidate)
            pair = compare(self._comparison.id, ask.key, ask.key, *sides, json_asked=False)
            self._found.append(pair)
        if len(self._found) >= SAVE_EVERY:
            self._save()

    def _side(self, output: Output) -> Side:
        return Side(
            output.token_ids,
            self._tokens.decode(output.token_ids),
            output.finish_reason == "stop",
            logprobs=output.logprobs,
        )

    def _save(self) -> None:
        self._store.record(self._found, {})
        self._found.clear()
