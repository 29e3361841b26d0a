"""Keys and tenants over HTTP: a tenant's admin is master of that tenant's keys, and of no other."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serving.tenants.keys import ADMIN, FRESH_SECONDS, INFER, SCOPES, add_key, id_of, new_key
from serving.tenants.redact import RedactingFormatter
from tests.serving.live import CHAT, Running, Wardrobe

ABSENT = "000000000000"


@pytest.fixture
def admin(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    """A client with nothing but the right to manage acme's keys."""
    with client(live, add_key(wardrobe.registry, "acme", [ADMIN])) as opened:
        yield opened


def client(live: Running, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=live.url, headers=headers, timeout=30)


def made(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 201, answer.text
    return answer.json()


def opens(live: Running, key: str) -> int:
    with client(live, key) as caller:
        return caller.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2}).status_code


def test_a_key_is_shown_once_and_works_at_once(admin: httpx.Client, live: Running) -> None:
    answer = admin.post("/v1/keys", json={"scopes": [INFER], "expires": "90d"})
    key = made(answer)
    assert answer.headers["cache-control"] == "no-store"
    assert (key["tenant"], key["scopes"], key["valid"]) == ("acme", ["infer"], True)
    assert opens(live, key["key"]) == 200
    listed = admin.get("/v1/keys")
    assert key["id"] in [each["id"] for each in listed.json()["data"]]
    assert key["key"] not in listed.text
    assert "hash" not in listed.text


def test_a_wish_that_is_sent_again_makes_no_second_key(admin: httpx.Client) -> None:
    wish = {"scopes": [INFER], "id": "0123456789ab"}
    assert made(admin.post("/v1/keys", json=wish))["id"] == wish["id"]
    again = admin.post("/v1/keys", json=wish)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert len(admin.get("/v1/keys").json()["data"]) == 2, "the admin's own and this one"


def test_rotation_leaves_a_grace_and_revocation_none(admin: httpx.Client, live: Running) -> None:
    old = made(admin.post("/v1/keys", json={"scopes": [INFER]}))
    new = made(admin.post(f"/v1/keys/{old['id']}/rotate", json={"grace": "1h"}))
    assert {opens(live, old["key"]), opens(live, new["key"])} == {200}
    assert new["scopes"] == old["scopes"]
    ended = admin.delete(f"/v1/keys/{old['id']}").json()
    assert (ended["valid"], ended["revoked_at"] is not None) == (False, True)
    assert admin.delete(f"/v1/keys/{old['id']}").json() == ended, "again changes nothing"
    time.sleep(FRESH_SECONDS)
    assert (opens(live, old["key"]), opens(live, new["key"])) == (401, 200)
    again = admin.post(f"/v1/keys/{old['id']}/rotate", json={})
    assert (again.status_code, again.json()["error"]["code"]) == (404, "key_not_found")


def test_another_tenant_s_keys_are_not_there(
    admin: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    beta = add_key(wardrobe.registry, "beta", SCOPES)
    operator = id_of(live.key)
    for key_id in (id_of(beta), operator, ABSENT):
        for answer in (
            admin.delete(f"/v1/keys/{key_id}"),
            admin.post(f"/v1/keys/{key_id}/rotate", json={}),
        ):
            assert answer.status_code == 404
            said = f"There is no key {key_id!r} here. GET /v1/keys lists them."
            assert answer.json()["error"]["message"] == said
    for tenant in ("beta", "operator", "nobody"):
        answer = admin.post("/v1/keys", json={"scopes": [INFER], "tenant": tenant})
        assert answer.json()["error"]["message"] == f"There is no tenant {tenant!r} here."
        assert admin.post("/v1/keys", json={"scopes": [INFER], "tenant": "acme"}).status_code == 201
    assert {each["tenant"] for each in admin.get("/v1/keys").json()["data"]} == {"acme"}
    assert opens(live, beta) == 200


def test_the_operator_makes_keys_for_every_tenant(live: Running) -> None:
    with live.client() as operator:
        key = made(operator.post("/v1/keys", json={"scopes": [INFER], "tenant": "gamma"}))
        assert opens(live, key["key"]) == 200
        tenants = {each["name"]: each for each in operator.get("/v1/tenants").json()["data"]}
        assert tenants["gamma"]["valid_keys"] == 1
        assert tenants["acme"]["adapters"] == ["acme/support"]
        assert operator.get("/v1/tenants/gamma").json() == tenants["gamma"]
        assert operator.get("/v1/tenants/nobody").status_code == 404


def test_a_tenant_sees_itself_and_no_other(live: Running, wardrobe: Wardrobe) -> None:
    add_key(wardrobe.registry, "beta", SCOPES)
    with client(live, add_key(wardrobe.registry, "acme", SCOPES)) as acme:
        assert acme.get("/v1/tenants/acme").json()["adapters"] == ["acme/support"]
        for other in ("beta", "operator", "nobody"):
            answer = acme.get(f"/v1/tenants/{other}")
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"There is no tenant {other!r} here."
        assert acme.get("/v1/tenants").status_code == 403


WRONG_WISHES: list[dict[str, Any]] = [
    {},
    {"scopes": []},
    {"scopes": ["everything"]},
    {"scopes": [INFER], "expires": "forever"},
    {"scopes": [INFER], "expires": "0d"},
    {"scopes": [INFER], "expires": ""},
    {"scopes": [INFER], "tenant": "Acme!"},
    {"scopes": [INFER], "tenant": ""},
    {"scopes": [INFER], "secret": "mine"},
    {"scopes": [INFER], "id": "short"},
]


def test_a_wish_that_does_not_fit_makes_no_key(live: Running) -> None:
    with live.client() as operator:
        before = operator.get("/v1/keys").json()
        for wish in WRONG_WISHES:
            assert operator.post("/v1/keys", json=wish).status_code == 400, wish
        assert operator.get("/v1/keys").json() == before


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Return the log as `wardrobe serve` writes it, and our own lines before that, too."""
    written = [RedactingFormatter().format(record) for record in caplog.records]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("wardrobe")]
    return "\n".join(written + ours)


def test_no_log_line_and_no_error_body_ever_has_a_key(
    live: Running, wardrobe: Wardrobe, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys wherever a client may put one: the whole text, its secret half, and a new one's."""
    caplog.set_level(logging.DEBUG)
    revoked = add_key(wardrobe.registry, "acme", SCOPES)
    wardrobe.registry.revoke_key(id_of(revoked))
    scopeless = add_key(wardrobe.registry, "acme", ["feedback"])
    keys = [live.key, revoked, scopeless, new_key()[1]]
    answers: list[httpx.Response] = []
    for key in keys:
        with client(live, key) as caller:
            caller.headers["x-unit-key"] = key
            answers += [
                caller.get("/v1/models"),
                caller.get(f"/v1/models/{key}"),
                caller.get(f"/{key}"),
                caller.get(f"/v1/models?key={key}"),
                caller.get("/v1/models", headers={"authorization": key}),
                caller.get("/v1/models", headers={"authorization": f"Basic {key}"}),
                caller.get("/v1/models", headers={"authorization": f"Bearer {key}0"}),
                caller.get("/v1/models", headers={"host": key}),
                caller.get(f"/t/{key}/v1/models"),
                caller.delete(f"/v1/keys/{key}"),
                caller.post("/v1/chat/completions", json=CHAT | {"model": key}),
                caller.post("/v1/chat/completions", json=CHAT | {key: 1}),
                caller.post("/v1/chat/completions", json=CHAT | {"stop": [key], "user": key}),
                caller.post("/v1/chat/completions", content=key),
                caller.post("/v1/completions", json={"model": "base", "prompt": 1, "user": key}),
                caller.post("/v1/endpoints", json={"name": key, "model": key}),
                caller.post("/v1/keys", json={"scopes": [key]}),
            ]
    bodies = [answer.text for answer in answers if answer.status_code >= 400]
    with live.client() as operator:
        keys.append(made(operator.post("/v1/keys", json={"scopes": [INFER]}))["key"])
        replaced = made(operator.post(f"/v1/keys/{id_of(keys[-1])}/rotate", json={}))
        keys.append(replaced["key"])
    assert len(bodies) > 40
    assert any("wr_" in body and "***" in body for body in bodies), "some would have told one"
    log = logged(caplog)
    assert "req_" in log, "the log was on"
    for key in keys:
        secret = key.split("_")[2]
        assert secret not in log, "in the log"
        assert [body for body in bodies if secret in body] == []


def test_what_others_log_has_no_key_either() -> None:
    key = new_key()[1]
    record = logging.LogRecord("lib", logging.ERROR, "x.py", 1, "bad %s", (key,), None)
    try:
        raise ValueError(f"cannot read {key[:40]}")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    written = RedactingFormatter().format(record)
    assert key[:16] in written, "its public part, to find it by"
    assert key[16:24] not in written
