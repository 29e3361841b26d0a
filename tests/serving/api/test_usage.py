"""Limits and usage over HTTP: headers, refusals, and that usage is what was streamed."""

import asyncio
import contextlib
import csv
import io
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest

from registry.adapter import AdapterName, Selector
from serving.api.connection import IDLE_CONNECTIONS
from serving.api.record import RequestRecord
from serving.engine.boundary import GenerateRequest, TokenDelta
from serving.tenants import balances
from serving.tenants.keys import ADMIN, INFER, READ, add_key
from serving.tenants.ledger import Ledger
from serving.tenants.limit import Subject
from serving.tenants.standing import Period
from serving.tenants.usage import Span
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine
from tests.serving.test_prompt_versions import push_prompt

ALWAYS = Span("2000", "2100")
BASE = "base"
RATE_HEADERS = {
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
}


@pytest.fixture
def acme(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    key = add_key(wardrobe.registry, "acme", (INFER, READ))
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as client:
        yield client


def still(live: Running) -> None:
    """Stop the clock: nothing comes back while a test runs, and no day ends."""
    now = Period.now()
    clock = live.services.meter.clock
    clock.seconds, clock.period = (lambda: 1e6), (lambda: now)


def limit(live: Running, tenant: str = "acme", **values: Any) -> None:
    with live.client() as client:
        answer = client.patch(f"/v1/limits/{tenant}", json=values)
    assert answer.status_code == 200, answer.text


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 8} | fields)


def usage(client: httpx.Client, **parameters: str) -> list[dict[str, Any]]:
    answer = client.get("/v1/usage", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def settled(live: Running) -> None:
    """Wait until no request is in flight, then write what they used."""
    deadline = time.monotonic() + 30
    while live.services.drain.in_flight:
        assert time.monotonic() < deadline, "a request does not end"
        time.sleep(0.01)
    live.services.meter.flush()


# Headers and refusals


def test_every_answer_and_refusal_tells_the_limits(live: Running, acme: httpx.Client) -> None:
    still(live)
    limit(live, requests_per_minute=4, tokens_per_minute=200)
    for number, (fields, status) in enumerate(
        [({}, 200), ({"stream": True}, 200), ({"max_tokens": 500}, 400), ({"min_tokens": 9}, 400)]
    ):
        answer = ask(acme, **fields)
        assert answer.status_code == status, answer.text
        assert set(answer.headers) >= RATE_HEADERS, (fields, answer.headers)
        assert answer.headers["x-ratelimit-limit-requests"] == "4"
        assert answer.headers["x-ratelimit-remaining-requests"] == str(3 - number)
    refused = ask(acme)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 15
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert acme.get("/v1/usage").status_code == 200, "reads are not limited"


def test_a_request_that_can_never_fit_is_told_so(live: Running, acme: httpx.Client) -> None:
    limit(live, tokens_per_minute=100)
    refused = ask(acme, max_tokens=60, n=2)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("exceeds_limit", "max_tokens")
    assert "and 120 more" in error["message"]
    assert "it can never run" in error["message"]
    assert "retry-after" not in refused.headers


def test_answers_that_run_are_capped_and_the_next_finds_room(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    with running(wardrobe, tokens, engine) as live, live.client() as client:
        limit(live, "operator", concurrent=1)
        body = CHAT | {"stream": True, "max_tokens": 400}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)  # and kept: an iterator that is thrown away ends its stream
            refused = ask(client)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_at_once"
            assert refused.headers["retry-after"] == "1"
        settled(live)
        for _ in range(3):
            assert ask(client).status_code == 200


def test_a_budget_ends_with_the_day(live: Running, acme: httpx.Client) -> None:
    still(live)
    first = ask(acme).json()["usage"]["total_tokens"]
    limit(live, tokens_per_day=first + 10)
    refused = ask(acme)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert int(refused.headers["retry-after"]) > 0


def test_a_full_queue_says_when_to_come_back_and_costs_no_tokens(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=0.02, max_running=1, max_waiting=0)
    with running(wardrobe, tokens, engine) as live, live.client() as client:
        body = CHAT | {"stream": True, "max_tokens": 400}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)  # and kept: an iterator that is thrown away ends its stream
            refused = ask(client)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "3"
            assert set(refused.headers) >= RATE_HEADERS
        settled(live)
        assert [row["answers"] for row in usage(client)] == [1]


# Routes


def test_only_the_operator_sets_limits_and_a_tenant_sees_its_own(
    live: Running, acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    limit(live, tokens_per_minute=500)
    limit(live, name="support", concurrent=3, reason="one desk")
    limit(live, "*", requests_per_minute=700)
    mine = acme.get("/v1/limits/acme").json()["data"]
    assert [(row["name"], row["tokens_per_minute"]) for row in mine] == [
        ("", 500),
        ("acme/support", None),
    ]
    assert (mine[0]["requests_per_minute"], mine[1]["concurrent"]) == (700, 3)
    assert mine[0]["remaining_tokens"] == 500
    for path in ("/v1/limits/beta", "/v1/limits/*"):
        assert acme.get(path).status_code == 404
    own_admin = add_key(wardrobe.registry, "acme", (READ, ADMIN))
    headers = {"authorization": f"Bearer {own_admin}"}
    for client_headers in ({}, headers):
        change = acme.patch("/v1/limits/acme", json={"concurrent": 9}, headers=client_headers)
        assert change.status_code == 403
        assert acme.delete("/v1/limits/acme", headers=client_headers).status_code == 403
        assert acme.get("/v1/limits", headers=client_headers).status_code == 403
    with live.client() as client:
        every = client.get("/v1/limits").json()["data"]
        assert [row["tenant"] for row in every] == ["*", "acme", "acme"]
        gone = client.delete("/v1/limits/acme", params={"name": "support"}).json()
        assert gone["cleared"] is True
        assert client.delete("/v1/limits/beta").json()["cleared"] is False


@pytest.mark.parametrize(
    "body",
    [{}, {"concurrent": 0}, {"tokens": 5}, {"concurrent": "9"}, {"name": "a b", "concurrent": 1}],
)
def test_a_limit_that_makes_no_sense_is_refused(live: Running, body: dict[str, Any]) -> None:
    with live.client() as client:
        assert client.patch("/v1/limits/acme", json=body).status_code == 400
        assert client.get("/v1/limits").json()["data"] == []


def test_a_tenant_sees_its_own_usage_and_the_operator_all(
    live: Running, acme: httpx.Client
) -> None:
    ask(acme, model="support")
    ask(acme)
    live.post(CHAT | {"model": "acme/support", "max_tokens": 8})
    with live.client() as operator:
        assert {row["tenant"] for row in usage(operator)} == {"acme", "operator"}
        assert {row["tenant"] for row in usage(operator, tenant="acme")} == {"acme"}
    rows = {row["name"]: row for row in usage(acme)}
    assert set(rows) == {"base", "acme/support"}
    assert rows["acme/support"]["version"] == "acme/support@v1"
    assert acme.get("/v1/usage", params={"tenant": "beta"}).status_code == 403
    for bad in (
        {"by": "week"},
        {"from": "yesterday"},
        {"to": ""},
        {"page": "2"},
        {"format": "xml"},
    ):
        assert acme.get("/v1/usage", params=bad).status_code == 400


def test_an_endpoint_is_limited_and_counted_under_its_own_name(
    live: Running, acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    name = AdapterName("acme", "desk")
    wardrobe.registry.create_endpoint(name, Selector.parse("acme/support"), {}, actor="test")
    limit(live, name="desk", requests_per_minute=1)
    deadline = time.monotonic() + 15
    while (answer := ask(acme, model="desk")).status_code == 404:
        assert time.monotonic() < deadline, "the endpoint does not come"
        time.sleep(0.05)
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert ask(acme, model="support").status_code == 200
    settled(live)
    rows = {row["name"]: row["version"] for row in usage(acme)}
    assert rows == {"acme/desk": "acme/support@v1", "acme/support": "acme/support@v1"}


def test_the_examples_of_a_prompt_version_are_prompt_tokens(
    live: Running, acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    push_prompt(wardrobe, name=AdapterName("acme", "shots"))
    bare = ask(acme).json()["usage"]["prompt_tokens"]
    said = ask(acme, model="shots@v1").json()["usage"]["prompt_tokens"]
    assert said > bare
    rows = {row["name"]: row["prompt_tokens"] for row in usage(acme)}
    assert rows == {"base": bare, "acme/shots": said}


@pytest.mark.parametrize(
    "how", [{"params": {"format": "csv"}}, {"headers": {"accept": "text/csv"}}]
)
def test_usage_comes_as_csv(live: Running, acme: httpx.Client, how: dict[str, Any]) -> None:
    said = ask(acme, model="support").json()["usage"]
    answer = acme.get("/v1/usage", **how)
    assert answer.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert int(row["total_tokens"]) == said["total_tokens"]
    assert int(row["prompt_tokens"]) == said["prompt_tokens"]


def test_two_servers_of_one_home_share_a_limit_and_one_usage(
    live: Running, acme: httpx.Client, wardrobe: Wardrobe, tokens: Tokens
) -> None:
    still(live)
    limit(live, requests_per_minute=5)
    with running(wardrobe, tokens) as other:
        still(other)
        there = httpx.Client(base_url=other.url, headers=acme.headers, timeout=30)
        with there:
            statuses = [ask(client).status_code for client in (acme, there) * 3]
            assert statuses == [200] * 5 + [429]
            settled(live)
            (row,) = usage(there)
            assert row["answers"] == 5


def test_health_says_whether_limits_are_shared(live: Running) -> None:
    with live.client() as client:
        assert client.get("/health/ready").json()["limits_shared"] is True
        live.services.meter.balances.problem = "database is locked"
        told = client.get("/health/ready").json()
    assert (told["limits_shared"], told["limits_problem"]) == (False, "database is locked")


def test_a_stopped_server_has_written_everything(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens) as live:
        said = live.post(CHAT | {"max_tokens": 8}).json()["usage"]
    with Ledger(wardrobe.registry.home) as ledger:
        (row,) = ledger.usage(ALWAYS, "hour")
    assert row.total_tokens == said["total_tokens"]


# Usage is what was streamed


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


def a_campaign(wardrobe: Wardrobe, tokens: Tokens, requests: int, seed: int = 7) -> list[str]:
    wardrobe.push()
    engine = Counting(step_seconds=0.0005, max_waiting=8, max_running=16)
    with running(wardrobe, tokens, engine) as live:
        still(live)
        keys = {"operator": live.key, "acme": add_key(wardrobe.registry, "acme", (INFER,))}
        for tenant in keys:
            # Budgets that do not bind: what is held is written for other servers to see.
            limit(live, tenant, tokens_per_day=10**9, concurrent=10**6)
        seen = asyncio.run(campaign(live, keys, requests, seed))
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
    found = a_campaign(wardrobe, tokens, 150)
    assert "usage is not what the engine made" in found
    assert "held in memory" in found
    assert "acme holds something" in found


# 503


def test_every_503_says_when_to_come_back(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    with running(wardrobe, tokens, engine, max_requests=1) as live, live.client() as client:
        body = CHAT | {"stream": True, "max_tokens": 400}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)  # and kept: an iterator that is thrown away ends its stream
            refused = ask(client)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        host, port = live.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE_CONNECTIONS):
                stack.enter_context(socket.create_connection((host, int(port))))
            crowded = httpx.get(f"{live.url}/health/live")
        assert (crowded.status_code, crowded.headers["retry-after"]) == (503, "2")
        assert crowded.json()["error"]["code"] == "unavailable"
