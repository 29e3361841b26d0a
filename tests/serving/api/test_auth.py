"""Every route × every verb × every kind of key, read from the application's own route table."""

import logging
import re
from typing import Any

import pytest
from litestar import Litestar, get
from litestar.routes import HTTPRoute

from serving.api.auth import OPEN, UndeclaredRoute, check_declared
from serving.api.settings import ServerSettings, UnsafeSettings
from serving.tenants.keys import SCOPES, hash_key, new_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running

VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
PARAMETER = re.compile(r"\{(\w+):\w+\}")
EXAMPLES = {
    "model": "base",
    "namespace": "acme",
    "name": "support",
    "tenant": "acme",
    "alias": "production",
    "experiment": "exp_000000000000",
    "action": "start",
}
ANONYMOUS_MAY = {("GET", "/health/live"), ("GET", "/health/ready")}


def routes_of(live: Running) -> list[tuple[str, dict[str, str]]]:
    """Return (path, verb → declared scope) of the routes the running server has."""
    app: Any = live.server.config.app
    found = [
        (
            PARAMETER.sub(lambda found: EXAMPLES[found[1]], route.path),
            {
                m: h.opt["scope"]
                for h in route.route_handlers
                if "scope" in h.opt
                for m in h.http_methods
            },
        )
        for route in app.routes
        if isinstance(route, HTTPRoute)
    ]
    assert len(found) == len(app.routes) >= 7
    return found


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key is not None else {}


def test_no_verb_of_any_route_opens_without_a_valid_key(live: Running, wardrobe: Wardrobe) -> None:
    key_id, revoked = new_key()
    wardrobe.registry.add_key(key_id, hash_key(revoked), "acme", SCOPES)
    wardrobe.registry.revoke_key(key_id)
    bad = [None, "x", "wr_nonsense", new_key()[1], revoked, "' OR 1=1 --"]
    asked = 0
    with live.client() as client:
        client.headers.pop("authorization")
        for path, scopes in routes_of(live):
            for variant in (path, path + "/", path + "/.", path.replace("/", "//", 1)):
                for verb in VERBS:
                    for key in bad:
                        status = client.request(verb, variant, headers=bearer(key)).status_code
                        asked += 1
                        if scopes.get(verb) == OPEN and status < 400:
                            assert (verb, path) in ANONYMOUS_MAY
                        else:
                            assert status in (401, 404, 405), (verb, variant, key, status)
                        if verb in scopes and scopes[verb] != OPEN and variant == path:
                            assert status == 401, (verb, path, key)
    assert asked > 1000


def test_a_valid_key_opens_exactly_the_declared_verbs(live: Running) -> None:
    with live.client() as client:
        for path, scopes in routes_of(live):
            for verb in VERBS:
                status = client.request(verb, path).status_code
                if verb in scopes:
                    nowhere = "exp_" in path  # there is no such experiment
                    assert status in ((404,) if nowhere else (200, 415)), (verb, path, status)
                else:
                    assert status == 405, (verb, path, status)


def test_a_key_without_the_scope_is_forbidden(live: Running, wardrobe: Wardrobe) -> None:
    key_id, text = new_key()
    wardrobe.registry.add_key(key_id, hash_key(text), "acme", ("read",))
    with live.client() as client:
        answer = client.post("/v1/chat/completions", json=CHAT, headers=bearer(text))
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_scope"
        assert client.get("/v1/models", headers=bearer(text)).status_code == 200


def test_a_refused_caller_learns_the_scheme_and_nothing_else(live: Running) -> None:
    with live.client() as client:
        answer = client.get("/metrics", headers=bearer("wr_secret"))
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert "wr_secret" not in answer.text
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


def test_a_route_without_a_declaration_stops_the_server_at_start() -> None:
    @get("/open-by-mistake", sync_to_thread=False)
    def mistake() -> None: ...

    with pytest.raises(UndeclaredRoute, match="/open-by-mistake"):
        check_declared(Litestar([mistake], openapi_config=None, logging_config=None))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_no_auth_is_refused_off_loopback(host: str) -> None:
    with pytest.raises(UnsafeSettings, match="loopback"):
        ServerSettings(host=host, auth=False)


def test_without_auth_only_loopback_names_get_in(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens, auth=False) as live, live.client() as client:
        client.headers.pop("authorization")
        assert client.get("/v1/models").status_code == 200
        rebound = client.get("/v1/models", headers={"host": "evil.example:8000"})
        assert rebound.status_code == 403
        assert client.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_the_log_names_the_request_and_neither_key_nor_prompt(
    live: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "a-very-private-question"
    body = CHAT | {"model": "acme/support", "max_tokens": 4}
    body["messages"] = [{"role": "user", "content": secret}]
    answer = live.post(body)
    live.post(body | {"temperature": 99})
    with live.client() as client:
        client.get("/v1/models", headers=bearer("wr_" + secret))
        client.get("/nothing%0aid=forged")
    lines = [r.getMessage() for r in caplog.records if r.name == "wardrobe.request"]
    line = next(line for line in lines if answer.headers["x-request-id"] in line)
    for part in ("status=200", "label=acme/support@v1", "completion_tokens=4", "outcome=ok"):
        assert part in line
    assert live.key not in caplog.text
    assert secret not in caplog.text
    assert "\nid=forged" not in caplog.text
