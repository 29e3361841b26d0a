"""An experiment on acme/support of a running server, as its users and its tenant see it."""

from typing import Any

import httpx

from registry.adapter import AdapterName
from tests.serving.live import CHAT, eventually

OTHER = AdapterName("acme", "other")
PATH = "/v1/adapters/acme/support/experiments"
DESIGN = {"treatments": ["@v2"], "metric": "solved:binary"}


def ask(
    client: httpx.Client,
    unit: str | None = None,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    headers = (headers or {}) | ({"x-unit-key": unit} if unit else {})
    body = CHAT | {"model": "acme/support", "max_tokens": 12} | fields
    return client.post("/v1/chat/completions", json=body, headers=headers)


def start(client: httpx.Client, exposure: float = 1.0, **design: Any) -> str:
    made = client.post(PATH, json=DESIGN | design)
    assert made.status_code == 201, made.text
    experiment = made.json()["id"]
    act(client, experiment, "start", exposure=exposure)
    everybody = exposure == 1 and "layer" not in design
    eventually(lambda: not everybody or "x-experiment" in ask(client, "waiting").headers)
    return experiment


def act(client: httpx.Client, experiment: str, action: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/experiments/{experiment}/{action}", json={"reason": "x"} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def state(client: httpx.Client, experiment: str) -> str:
    return client.get(f"/v1/experiments/{experiment}").json()["state"]


def solve(client: httpx.Client) -> None:
    """Let the treatment solve nine of ten, and the control one of ten."""
    for number in range(260):
        answer = ask(client, f"user {number}")
        assert answer.status_code == 200
        solved = int((answer.headers.get("x-arm") == "treatment") == (number % 10 > 0))
        said = {"request_id": answer.headers["x-request-id"], "metric": "solved", "value": solved}
        client.post("/v1/feedback", json=said)
