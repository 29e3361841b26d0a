"""Limits over HTTP: what is set and shown, what every answer tells, and how it is refused."""

import time
from typing import Any

import httpx
import pytest

from registry.adapter import AdapterName, Selector
from serving.tenants.keys import ADMIN, READ, add_key
from serving.tokens import Tokens
from tests.serving.api.metered import ask, limit, settled, still, usage
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine

RATE_HEADERS = {
    f"x-ratelimit-{what}-{kind}"
    for what in ("limit", "remaining", "reset")
    for kind in ("requests", "tokens")
}


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
        typo = client.delete("/v1/limits/acme", params={"nmae": "support"})
        assert (typo.status_code, typo.json()["error"]["param"]) == (400, "nmae")
        assert client.get("/v1/limits").json()["data"] == every, "and not all of acme's is gone"
        gone = client.delete("/v1/limits/acme", params={"name": "support"}).json()
        assert gone["cleared"] is True
        assert client.delete("/v1/limits/beta").json()["cleared"] is False


def test_a_limit_of_a_tenant_that_nobody_is_names_those_there_are(
    live: Running, acme: httpx.Client
) -> None:
    with live.client() as client:
        answer = client.patch("/v1/limits/acmee", json={"concurrent": 3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "tenant_not_found")
        assert "Did you mean acme?" in answer.json()["error"]["message"]
        assert client.get("/v1/limits").json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [{}, {"concurrent": 0}, {"tokens": 5}, {"concurrent": "9"}, {"name": "a b", "concurrent": 1}],
)
def test_a_limit_that_makes_no_sense_is_refused(live: Running, body: dict[str, Any]) -> None:
    with live.client() as client:
        assert client.patch("/v1/limits/acme", json=body).status_code == 400
        assert client.get("/v1/limits").json()["data"] == []


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
