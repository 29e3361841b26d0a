"""Usage is what was streamed: campaigns of mixed requests against the engine's own count."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest

from serving.api.record import RequestRecord
from serving.engine.boundary import GenerateRequest, TokenDelta
from serving.tenants import balances
from serving.tenants.keys import INFER, add_key
from serving.tenants.limit import Subject
from serving.tokens import Tokens
from tests.serving.api.metered import ALWAYS, limit, settled, still
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine

BASE = "base"


@dataclass
class Counting(ScriptedEngine):
    """Keeps the engine's own count of what it made for whom: the oracle."""

    made: Counter[tuple[str, str]] = field(default_factory=Counter)

    async def _run(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        digest = request.adapter.digest if request.adapter else BASE
        before = 0
        async for delta in ScriptedEngine._run(self, request):
            if request.tenant:  # and not the server's own check of a new version
                self.made[request.tenant, digest] += delta.completion_tokens - before
            before = delta.completion_tokens
            yield delta


@dataclass
class Seen:
    """What one tenant's client was told and sent."""

    prompt: int = 0  # of answers that were read to their end
    completion: int = 0
    characters: int = 0  # of streams that were read to their end, one for each token
    streamed: int = 0  # tokens of those, as their usage says
    left: int = 0  # characters of streams that were left
    ended: int = 0
    aborted: int = 0
    refused: int = 0


def a_request(dice: random.Random) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {
        "model": dice.choice(["base", "acme/support", "acme/support@v1"]),
        "max_tokens": dice.randint(1, 40),
        "n": dice.choice([1, 1, 2, 3]),
        "stream": dice.random() < 0.7,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if dice.random() < 0.1:
        body["stop"] = ["port@", "ase b"]
    if dice.random() < 0.05:
        body |= dice.choice([{"max_tokens": 9999}, {"model": "acme/none"}, {"min_tokens": 99}])
    if dice.random() < 0.5:
        return "/v1/chat/completions", CHAT | body
    return "/v1/completions", body | {"prompt": ["hello"] * dice.choice([1, 2])}


async def send(client: httpx.AsyncClient, seen: Seen, dice: random.Random) -> None:
    path, body = a_request(dice)
    patience = dice.randint(0, 30) if dice.random() < 0.3 else None
    if not body["stream"]:
        await _send_whole(client, seen, path, body, patience)
        return
    async with client.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            seen.refused += 1
            return
        events = characters = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = msgspec.json.decode(line[6:])
            if event["usage"]:
                seen.prompt += event["usage"]["prompt_tokens"]
                seen.completion += event["usage"]["completion_tokens"]
                if "stop" not in body:
                    seen.streamed += event["usage"]["completion_tokens"]
                    seen.characters += characters
                seen.ended += 1
            for choice in event["choices"]:
                delta = choice.get("delta", {}).get("content", "")
                characters += len(choice.get("text") or delta)
            events += 1
            if events == patience:
                seen.aborted += 1
                seen.left += characters
                return  # closes the connection


async def _send_whole(
    client: httpx.AsyncClient, seen: Seen, path: str, body: dict[str, Any], patience: int | None
) -> None:
    asked = asyncio.ensure_future(client.post(path, json=body))
    if patience is not None:
        done, _ = await asyncio.wait([asked], timeout=patience / 1000)
        if not done:
            asked.cancel()
            seen.aborted += 1
            return
    answer = await asked
    if answer.status_code == 200:
        said = answer.json()["usage"]
        seen.prompt += said["prompt_tokens"]
        seen.completion += said["completion_tokens"]
        seen.ended += 1
    else:
        seen.refused += 1


async def campaign(
    live: Running, keys: dict[str, str], requests: int, seed: int
) -> dict[str, Seen]:
    """Send that many mixed requests, some of which leave in the middle, from both tenants."""
    seen = {tenant: Seen() for tenant in keys}
    dice = random.Random(seed)
    turns = iter(range(requests))

    async def client_of(tenant: str, own: random.Random) -> None:
        headers = {"authorization": f"Bearer {keys[tenant]}"}
        async with httpx.AsyncClient(base_url=live.url, headers=headers, timeout=60) as client:
            for _ in turns:
                await send(client, seen[tenant], own)

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            tenant = ("acme", "operator")[number % 2]
            group.create_task(client_of(tenant, random.Random(dice.random())))
    return seen


def wrong(live: Running, engine: Counting, seen: dict[str, Seen]) -> list[str]:
    """Return what does not add up after a campaign."""
    settled(live)
    meter = live.services.meter
    rows = meter.ledger.usage(ALWAYS, "version")
    base = live.services.base.fingerprint
    counted = Counter(
        {
            (row.tenant, BASE if row.digest == base else row.digest): row.completion_tokens
            for row in rows
        }
    )
    found = {"usage is not what the engine made": counted != engine.made}
    found["held in memory"] = meter.tally.holdings() != {}
    for tenant, told in seen.items():
        stands = meter.balances.look(Subject(tenant))
        own = [row for row in rows if row.tenant == tenant]
        prompt = sum(row.prompt_tokens for row in own)
        completion = sum(row.completion_tokens for row in own)
        found[f"{tenant} holds something"] = (stands.answers, stands.held) != (0, 0)
        assert stands.tokens is not None
        found[f"{tenant}'s bucket"] = stands.tokens.taken != prompt + completion
        found[f"{tenant}'s sum"] = stands.day != prompt + completion
        found[f"{tenant} read more than was counted"] = (
            told.prompt > prompt or told.completion + told.left > completion
        )
        found[f"{tenant} was streamed something else"] = told.characters != told.streamed
        found[f"{tenant}'s answers"] = not (
            told.ended <= sum(row.answers for row in own) <= told.ended + told.aborted
        )
        found[f"{tenant} sent no mix"] = not (told.ended and told.aborted and told.refused)
    return [name for name, is_wrong in found.items() if is_wrong]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no database that cannot be used."""
    monkeypatch.setattr(balances, "BUSY_SECONDS", 60.0)


def a_campaign(
    wardrobe: Wardrobe, tokens: Tokens, requests: int, step_seconds: float = 0.0005
) -> list[str]:
    wardrobe.push()
    engine = Counting(step_seconds=step_seconds, max_waiting=8, max_running=16)
    with running(wardrobe, tokens, engine) as live:
        still(live)
        keys = {"operator": live.key, "acme": add_key(wardrobe.registry, "acme", (INFER,))}
        for tenant in keys:
            # Budgets that do not bind: what is held is written for other servers to see.
            limit(live, tenant, tokens_per_day=10**9, concurrent=10**6)
        seen = asyncio.run(campaign(live, keys, requests, seed=7))
        return wrong(live, engine, seen)


def test_usage_is_what_was_streamed_over_mixed_requests_with_aborts(
    wardrobe: Wardrobe, tokens: Tokens, patient: None
) -> None:
    assert a_campaign(wardrobe, tokens, 400) == []


@pytest.mark.long
def test_usage_is_what_was_streamed_over_5000_mixed_requests_with_aborts(
    wardrobe: Wardrobe, tokens: Tokens, patient: None
) -> None:
    assert a_campaign(wardrobe, tokens, 5000) == []


def without_aborts(record: RequestRecord, write: Callable[[RequestRecord], None]) -> None:
    if record.outcome == "disconnect":
        record.lease = None
    write(record)


def test_the_campaign_sees_a_server_that_does_not_settle_aborts(
    wardrobe: Wardrobe, tokens: Tokens, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RequestRecord.write
    monkeypatch.setattr(RequestRecord, "write", lambda record: without_aborts(record, write))
    # Slow, so that whoever leaves does so before the answer has ended, on any machine.
    found = a_campaign(wardrobe, tokens, 300, step_seconds=0.005)
    assert "usage is not what the engine made" in found
    assert "held in memory" in found
    assert {"acme holds something", "operator holds something"} & set(found)
