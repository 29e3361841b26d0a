"""Prompt tokens that did not have to be computed: told in usage and metrics, counted as before."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from serving.engine.boundary import GenerateRequest, TokenDelta
from serving.tokens import Tokens
from tests.serving.api.test_answers import USAGE, chunks_of
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine

KNOWN = 4
NAMED = CHAT | {"model": "acme/support", "max_tokens": 3}


class RememberingEngine(ScriptedEngine):
    """Knows the first tokens of a prompt that it has seen."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    async def _run(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        cached = KNOWN if request.prompt_ids in self.seen else 0
        self.seen.add(request.prompt_ids)
        async for delta in super()._run(request):
            yield replace(delta, cached_tokens=cached)


@pytest.fixture
def remembering(wardrobe: Wardrobe, tokens: Tokens) -> Iterator[Running]:
    wardrobe.push()
    with running(wardrobe, tokens, RememberingEngine()) as live:
        yield live


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


def test_usage_says_how_much_of_the_prompt_was_known(remembering: Running) -> None:
    first, second = (remembering.post(NAMED).json()["usage"] for _ in range(2))
    assert (cached(first), cached(second)) == (0, KNOWN)
    assert first["prompt_tokens"] == second["prompt_tokens"] > KNOWN
    assert chunks_of(remembering.post(NAMED | {"stream": True} | USAGE))[-1]["usage"] == second
    answer = remembering.openai().chat.completions.create(**NAMED)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == KNOWN


def test_what_the_choices_of_one_request_share_was_not_known_before_it(
    remembering: Running,
) -> None:
    body = {"model": "base", "prompt": ["what is new", "what comes again"], "n": 3}
    usages = [remembering.post(body, "/v1/completions").json()["usage"] for _ in range(2)]
    assert [cached(usage) for usage in usages] == [0, 2 * KNOWN]
    assert usages[0]["prompt_tokens"] == len("what is new" + "what comes again")


def test_the_metrics_have_the_hits_of_each_version_and_of_the_engine(
    remembering: Running,
) -> None:
    for _ in range(3):
        remembering.post(NAMED)
    with remembering.client() as client:
        lines = client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    version = 'version="acme/support@v1"'
    prompts = float(found[f'wardrobe_tokens_total{{kind="prompt",{version}}}'])
    assert float(found[f"wardrobe_version_cached_tokens_total{{{version}}}"]) == 2 * KNOWN
    label = f'{{model_name="{remembering.services.base.id}"}}'
    assert float(found[f"vllm:prefix_cache_queries_total{label}"]) >= prompts
    assert float(found[f"vllm:prefix_cache_hits_total{label}"]) == 0.0, "the script's own counter"
    assert {"wardrobe_prefix_cache_bytes", "wardrobe_prefix_cache_max_bytes"} <= set(found)
