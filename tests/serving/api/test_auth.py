"""Every route × every verb × every kind of key, read from the application's own route table."""

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from litestar import Litestar, get
from litestar.routes import HTTPRoute

from serving.api.auth import OPEN, UndeclaredRoute, check_declared
from serving.api.settings import ServerSettings, UnsafeSettings
from serving.tenants.keys import (
    INFER,
    OPERATOR,
    PROMOTE,
    PUSH,
    READ,
    SCOPES,
    add_key,
    hash_key,
    id_of,
    new_key,
)
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
    "whose": "acme",
    "key": "000000000000",
    "request_id": "req_exp_000000000000",  # nowhere to be found, as the experiment
}
ANONYMOUS_MAY = {("GET", "/health/live"), ("GET", "/health/ready")}
UNDER_A_TENANT = "/t/acme/"


@dataclass(frozen=True)
class Declared:
    """A verb of a route, and who may use it."""

    verb: str
    path: str
    scope: str
    operator: bool

    def status_for(self, tenant: str, scopes: Collection[str]) -> int | None:
        """Return the status that a valid key gets; None for whatever its handler says."""
        if self.scope == OPEN:
            return None
        if self.path.startswith(UNDER_A_TENANT) and tenant != "acme":
            return 404
        if self.scope not in scopes or (self.operator and tenant != OPERATOR):
            return 403
        return None


def routes_of(live: Running) -> list[tuple[str, list[Declared]]]:
    """Return (path, what is declared for it) of the routes the running server has."""
    app: Any = live.server.config.app
    found = [
        (
            path := PARAMETER.sub(lambda found: EXAMPLES[found[1]], route.path),
            [
                Declared(verb, path, handler.opt["scope"], handler.opt["operator"])
                for handler in route.route_handlers
                if "scope" in handler.opt
                for verb in handler.http_methods
            ],
        )
        for route in app.routes
        if isinstance(route, HTTPRoute)
    ]
    assert len(found) == len(app.routes) >= 20
    return found


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key is not None else {}


@pytest.fixture
def bad_keys(wardrobe: Wardrobe) -> dict[str, str | None]:
    """Every kind of key that opens nothing."""
    revoked = add_key(wardrobe.registry, "acme", SCOPES)
    wardrobe.registry.revoke_key(id_of(revoked))
    other = add_key(wardrobe.registry, "acme", SCOPES)
    return {
        "none": None,
        "malformed": "wr_nonsense",
        "too long": "wr_" + "0" * 1000,
        "unknown": new_key()[1],
        "of another secret": other[:-1] + ("0" if other[-1] != "0" else "1"),
        "revoked": revoked,
        "expired": add_key(wardrobe.registry, "operator", SCOPES, timedelta(0)),
        "SQL": "' OR 1=1 --",
    }


def test_no_verb_of_any_route_opens_without_a_valid_key(
    live: Running, bad_keys: dict[str, str | None]
) -> None:
    asked = 0
    with live.client() as client:
        client.headers.pop("authorization")
        for path, declared in routes_of(live):
            scopes = {each.verb: each.scope for each in declared}
            for verb in VERBS:
                for kind, key in bad_keys.items():
                    status = client.request(verb, path, headers=bearer(key)).status_code
                    asked += 1
                    if scopes.get(verb) == OPEN:
                        assert (verb, path) in ANONYMOUS_MAY
                        assert status == 200
                    else:
                        wanted = 401 if verb in scopes else 405
                        assert status == wanted, (verb, path, kind, status)
    assert asked > 2000


def test_no_other_spelling_of_a_path_opens_without_a_key(live: Running) -> None:
    with live.client() as client:
        client.headers.pop("authorization")
        for path, _ in routes_of(live):
            for variant in (path + "/", path + "/.", path.replace("/", "//", 1), "/x/.." + path):
                for verb in VERBS:
                    status = client.request(verb, variant).status_code
                    if status < 400:
                        assert (verb, path) in ANONYMOUS_MAY
                    else:
                        assert status in (401, 404, 405), (verb, variant, status)


def test_every_scope_of_every_tenant_opens_exactly_what_is_declared(
    live: Running, wardrobe: Wardrobe
) -> None:
    """Routes × verbs × keys. What a handler says to a caller it lets in is not 401, 403 or 405."""
    holders: list[tuple[str, tuple[str, ...]]] = [
        (tenant, (scope,)) for tenant in ("acme", OPERATOR) for scope in SCOPES
    ]
    holders += [("acme", SCOPES), ("beta", SCOPES), (OPERATOR, SCOPES)]
    keys = {holder: add_key(wardrobe.registry, *holder) for holder in holders}
    opened: set[tuple[str, str]] = set()
    with live.client() as client:
        for path, declared in routes_of(live):
            for each in declared:
                for (tenant, scopes), key in keys.items():
                    status = client.request(each.verb, path, headers=bearer(key)).status_code
                    wanted = each.status_for(tenant, scopes)
                    where = (each, tenant, scopes, status)
                    if wanted is not None:
                        assert status == wanted, where
                        continue
                    assert status not in (401, 403, 405), where
                    assert status < 500, where
                    opened.add((each.verb, path))
                    if tenant == "beta" and "acme" in path:
                        assert status in (404, 415), where  # 415: its body was not read yet
            for verb in set(VERBS) - {each.verb for each in declared}:
                status = client.request(verb, path).status_code
                assert status == 405, (verb, path, status)
    assert opened == {(each.verb, path) for path, found in routes_of(live) for each in found}


def test_nothing_is_changed_with_a_scope_for_looking(live: Running) -> None:
    for path, declared in routes_of(live):
        for each in declared:
            looks = each.verb in ("GET", "HEAD")
            assert looks or each.scope not in (OPEN, READ), (each.verb, path)
            assert not looks or each.scope not in (PUSH, PROMOTE, INFER), (each.verb, path)


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
        assert (rebound.status_code, rebound.json()["error"]["code"]) == (400, "invalid_host")
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
