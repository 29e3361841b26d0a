"""A tenant sees and changes its own; what is shared it may use; the rest does not exist for it."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from registry.adapter import AdapterName
from registry.errors import InvalidName, NotFound
from serving.engine.boundary import GenerateRequest
from serving.tenants.keys import FRESH_SECONDS, SCOPES, add_key, rotate_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine, repeat_label

BETA = AdapterName("beta", "legal")


@pytest.fixture
def two(live: Running, wardrobe: Wardrobe) -> Running:
    """A server with acme/support and beta/legal in production."""
    wardrobe.push(BETA)
    assert chat(live, live.key, "beta/legal").status_code == 200, "it waits until it is live"
    return live


@pytest.fixture
def acme(two: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    key = add_key(wardrobe.registry, "acme", SCOPES)
    with httpx.Client(base_url=two.url, headers=bearer(key), timeout=30) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def chat(live: Running, key: str, model: str) -> httpx.Response:
    body = CHAT | {"model": model, "max_tokens": 2}
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, headers=bearer(key), timeout=30)


def said(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


def test_a_tenant_uses_its_own_adapters_with_and_without_the_namespace(acme: httpx.Client) -> None:
    for model in ("acme/support", "support", "support@v1", "support@production", "base"):
        answer = acme.post("/v1/chat/completions", json=CHAT | {"model": model, "max_tokens": 2})
        assert answer.status_code == 200, (model, answer.text)
    assert acme.get("/v1/models/support").json()["version"] == "acme/support@v1"


@pytest.mark.parametrize("selector", ["", "@v1", "@production", "@v9", "@nowhere"])
def test_what_is_anothers_answers_as_what_is_not_there(acme: httpx.Client, selector: str) -> None:
    """Word for word: a guess must not tell which names another tenant has."""
    for name in ("beta/legal", "beta/nothing"):
        model = name + selector
        asked = CHAT | {"model": model, "max_tokens": 2}
        for answer in (
            acme.post("/v1/chat/completions", json=asked),
            acme.post("/v1/completions", json={"model": model, "prompt": "a"}),
            acme.get(f"/v1/models/{model}"),
        ):
            assert answer.status_code == 404
            cure = "GET /v1/models lists what there is."
            assert said(answer) == f"There is no adapter {name} here. {cure}"


def test_no_digest_of_another_tenants_version_opens_it(
    acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    digest = wardrobe.registry.versions(BETA)[0].digest
    for model in (f"beta/legal@sha256:{digest}", f"acme/support@sha256:{digest}"):
        answer = acme.post("/v1/chat/completions", json=CHAT | {"model": model})
        assert answer.status_code == 404


def test_lists_hold_only_what_the_caller_may_use(acme: httpx.Client, two: Running) -> None:
    mine = [card["id"] for card in acme.get("/v1/models").json()["data"]]
    with two.client() as operator:
        everybody = [card["id"] for card in operator.get("/v1/models").json()["data"]]
    assert mine == [two.services.base.id, "acme/support"]
    assert everybody == [*mine, "beta/legal"]


def test_what_is_shared_may_be_used_and_not_changed(acme: httpx.Client, wardrobe: Wardrobe) -> None:
    wardrobe.registry.share(BETA, "acme")
    time.sleep(FRESH_SECONDS)
    assert acme.get("/v1/models/beta/legal").status_code == 200
    assert [card["id"] for card in acme.get("/v1/models").json()["data"]][-1] == "beta/legal"
    assert acme.get("/v1/adapters/beta/legal").status_code == 200
    move = {"version": 1, "reason": "mine now"}
    assert acme.put("/v1/adapters/beta/legal/aliases/production", json=move).status_code == 404
    wardrobe.registry.unshare(BETA, "acme")
    time.sleep(FRESH_SECONDS)
    assert acme.get("/v1/models/beta/legal").status_code == 404


def test_a_tenant_changes_only_its_own(acme: httpx.Client, wardrobe: Wardrobe) -> None:
    wardrobe.push(promote=False)
    own, others = "/v1/adapters/acme/support", "/v1/adapters/beta/legal"
    moved = acme.put(f"{own}/aliases/production", json={"version": 2, "reason": "better"})
    assert moved.status_code == 200, moved.text
    assert (moved.json()["version"], moved.json()["previous"]) == (2, 1)
    back = acme.post(f"{own}/aliases/production/rollback", json={"reason": "worse"})
    assert (back.status_code, back.json()["version"]) == (200, 1)
    last = acme.get(f"{own}/history").json()["data"][-1]
    assert (last["action"], last["actor"], last["reason"]) == ("rollback", "acme", "worse")
    for answer in (
        acme.get(others),
        acme.get(f"{others}/history"),
        acme.put(f"{others}/aliases/production", json={"version": 1, "reason": "x"}),
        acme.post(f"{others}/aliases/production/rollback", json={"reason": "x"}),
        acme.post(f"{others}/versions", files={"adapter_config.json": b"{}"}),
    ):
        assert answer.status_code == 404, answer.text
    assert len(wardrobe.registry.history(BETA)) == 1


def test_a_move_that_cannot_be_made_says_why(acme: httpx.Client) -> None:
    path = "/v1/adapters/acme/support/aliases/production"
    late = acme.put(path, json={"version": 1, "reason": "x", "expected_generation": 7})
    assert (late.status_code, late.json()["error"]["code"]) == (409, "conflict")
    assert acme.post(f"{path}/rollback", json={"reason": "x"}).status_code == 409
    assert acme.put(path, json={"version": 5, "reason": "x"}).status_code == 404
    for wrong in ({"version": 1}, {"version": 0, "reason": "x"}, {"version": 1, "reason": ""}):
        assert acme.put(path, json=wrong).status_code == 400
    unknown = acme.put(path, json={"version": 1, "reason": "x", "forse": True})
    assert (unknown.status_code, "forse" in said(unknown)) == (400, True)
    assert acme.put(path, content=b"[" * 100_000, headers=JSON).status_code == 400


JSON = {"content-type": "application/json"}


def test_what_tells_of_every_tenant_is_the_operators(acme: httpx.Client, two: Running) -> None:
    answer = acme.get("/metrics")
    assert (answer.status_code, "operator" in said(answer)) == (403, True)
    with two.client() as operator:
        assert operator.get("/metrics").status_code == 200


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_opens_its_own_routes_and_no_other(
    two: Running, wardrobe: Wardrobe, scope: str
) -> None:
    key = add_key(wardrobe.registry, "acme", [scope])
    own = "/v1/adapters/acme/support"
    move = {"version": 1, "reason": "again"}
    with httpx.Client(base_url=two.url, headers=bearer(key), timeout=30) as client:
        answers = {
            "infer": client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2}),
            "read": client.get("/v1/models"),
            "push": client.post(f"{own}/versions", json={}),
            "promote": client.put(f"{own}/aliases/production", json=move),
        }
    for needed, answer in answers.items():
        assert (answer.status_code != 403) == (needed == scope), (needed, answer.status_code)


def test_an_expired_key_is_no_key_and_rotation_leaves_a_grace(
    two: Running, wardrobe: Wardrobe
) -> None:
    registry = wardrobe.registry
    over = add_key(registry, "acme", SCOPES, timedelta(seconds=0))
    assert chat(two, over, "acme/support").status_code == 401
    old = add_key(registry, "acme", ["infer"], timedelta(days=1))
    new = rotate_key(registry, old.split("_")[1], timedelta(seconds=1.5))
    assert {chat(two, key, "acme/support").status_code for key in (old, new)} == {200}
    time.sleep(1.5 + FRESH_SECONDS)
    assert chat(two, old, "acme/support").status_code == 401
    assert chat(two, new, "acme/support").status_code == 200
    replacement = registry.find_key(new.split("_")[1])
    assert replacement is not None
    assert replacement.scopes == ("infer",)
    lives = datetime.fromisoformat(str(replacement.expires_at)) - datetime.now(UTC)
    assert timedelta(hours=23) < lives < timedelta(hours=25), "as long as the old one was to live"
    forever = add_key(registry, "acme", ["infer"]).split("_")[1]
    successor = registry.find_key(rotate_key(registry, forever, timedelta(0)).split("_")[1])
    assert successor is not None
    assert successor.expires_at is None
    with pytest.raises(NotFound, match="no valid key"):
        rotate_key(registry, forever, timedelta(hours=1))


def test_what_cannot_be_a_tenant_is_called_one_and_no_adapter(wardrobe: Wardrobe) -> None:
    with pytest.raises(InvalidName, match="'Acme!' is not a tenant"):
        add_key(wardrobe.registry, "Acme!", SCOPES)


def test_the_engine_learns_whose_key_a_request_came_with(
    tokens: Tokens, wardrobe: Wardrobe
) -> None:
    seen: list[tuple[str, str]] = []

    def script(request: GenerateRequest) -> Iterator[int]:
        seen.append((request.tenant, request.priority))
        return repeat_label(request)

    keys = [add_key(wardrobe.registry, tenant, SCOPES) for tenant in ("acme", "beta")]
    with running(wardrobe, tokens, ScriptedEngine(script)) as live:
        body = {"model": "base", "prompt": "hello", "max_tokens": 2, "user": "beta"}
        for key in keys:
            assert chat(live, key, "base").status_code == 200
            url = f"{live.url}/v1/completions"
            assert httpx.post(url, json=body, headers=bearer(key), timeout=30).status_code == 200
    assert seen == [("acme", "normal")] * 2 + [("beta", "normal")] * 2
