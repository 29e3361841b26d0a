"""What the tests of limits and usage ask a server."""

import time
from typing import Any

import httpx

from serving.tenants.standing import Period
from serving.tenants.usage import Span
from tests.serving.live import CHAT, Running

ALWAYS = Span("2000", "2100")


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
