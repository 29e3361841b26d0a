"""An endpoint answers under one name while what is behind it changes, and fills in what is left
out. It is found by key, by path and by Host name; whose it is says the key alone."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from registry.adapter import AdapterName, AdapterRef, Selector
from registry.errors import InvalidName
from serving.api.hosts import AllowedHost, HostInvalid
from serving.tenants.keys import FRESH_SECONDS, SCOPES, add_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, NAME, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine
from tests.serving.test_prompt_versions import push_prompt

CHATTY = AdapterName("acme", "chat")
FOLLOWED = 5.0  # seconds, of which a loaded machine needs a few tenths


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def acme(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    """A client with every scope of acme, whose support@v1 is in production."""
    key = add_key(wardrobe.registry, "acme", SCOPES)
    with httpx.Client(base_url=live.url, headers=bearer(key), timeout=30) as client:
        yield client


def make(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/endpoints", json={"name": "chat", "model": "support", **fields})
    assert answer.status_code == 201, answer.text
    return answer.json()


def asked(client: httpx.Client, model: str = "chat", **fields: Any) -> httpx.Response:
    """Ask until the server knows the endpoint."""
    deadline = time.monotonic() + FOLLOWED
    while True:
        answer = client.post("/v1/chat/completions", json=CHAT | {"model": model, **fields})
        if answer.status_code != 404 or time.monotonic() > deadline:
            return answer
        time.sleep(0.02)


def until(client: httpx.Client, header: str, value: str) -> httpx.Response:
    """Ask until the answer's header says so."""
    deadline = time.monotonic() + FOLLOWED
    while True:
        answer = asked(client, max_tokens=2)
        if answer.headers.get(header) == value or time.monotonic() > deadline:
            return answer
        time.sleep(0.02)


def last(live: Running) -> Any:
    """Return the request that the engine was given last."""
    return live.engine.asked[-1]


def test_the_name_stays_while_what_is_behind_it_changes(
    acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    make(acme)
    first = asked(acme, max_tokens=2)
    assert (first.headers["x-endpoint"], first.headers["x-adapter"]) == (
        "acme/chat",
        "acme/support@v1",
    )
    assert first.json()["model"] == "acme/support@v1", "the answer is honest about the version"
    wardrobe.push()
    until(acme, "x-adapter", "acme/support@v2")
    pinned = acme.patch("/v1/endpoints/acme/chat", json={"model": "support@v1"})
    assert pinned.json()["model"] == "acme/support@v1"
    assert until(acme, "x-adapter", "acme/support@v1").status_code == 200
    acme.patch("/v1/endpoints/acme/chat", json={"model": "base"})
    bare = until(acme, "x-adapter", acme.get("/v1/models").json()["data"][0]["id"])
    assert bare.headers["x-endpoint"] == "acme/chat"
    assert acme.delete("/v1/endpoints/acme/chat").json()["deleted"] is True
    deadline = time.monotonic() + FOLLOWED
    while (gone := asked_once(acme)).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "adapter_not_found")


def asked_once(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/chat/completions", json=CHAT | {"model": "chat", "max_tokens": 2})


def test_defaults_fill_in_what_the_request_leaves_out_and_nothing_else(
    acme: httpx.Client, live: Running
) -> None:
    defaults = {"temperature": 0.25, "max_tokens": 3, "top_p": 0.5, "system_prompt": "be brief"}
    make(acme, defaults=defaults)
    assert asked(acme).status_code == 200
    sampling = last(live).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.25, 0.5, 3)
    assert b"be brief" in bytes(i for i in last(live).prompt_ids if i < 256)
    own = {"temperature": 0.75, "max_completion_tokens": 2}
    system = [{"role": "system", "content": "be long"}, *CHAT["messages"]]
    assert asked(acme, messages=system, **own).status_code == 200
    sampling = last(live).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.75, 0.5, 2)
    prompt = bytes(i for i in last(live).prompt_ids if i < 256)
    assert (b"be long" in prompt, b"be brief" in prompt) == (True, False)
    raw = acme.post("/v1/completions", json={"model": "chat", "prompt": "a"})
    assert raw.status_code == 200
    assert last(live).sampling.max_tokens == 3
    assert asked(acme, "support@production").status_code == 200
    assert last(live).sampling.temperature == 1.0, "the adapter itself has no defaults"


def test_a_schema_is_a_default_like_others(acme: httpx.Client, live: Running) -> None:
    schema = {"type": "object", "properties": {"intent": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    make(acme, defaults={"response_format": wanted})
    assert asked(acme, max_tokens=2).status_code == 200
    grammar = last(live).sampling.grammar
    assert (grammar.kind, json.loads(grammar.source)) == ("json", schema)
    assert asked(acme, max_tokens=2, response_format={"type": "text"}).status_code == 200
    assert last(live).sampling.grammar is None
    bad = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ["no object"]}}
    refused = acme.patch("/v1/endpoints/acme/chat", json={"defaults": {"response_format": bad}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_a_version_s_own_system_prompt_goes_before_the_endpoint_s(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    push_prompt(wardrobe, system="judged with this", examples=[])
    make(acme, model="support@v2", defaults={"system_prompt": "never seen"})
    assert asked(acme, max_tokens=2).status_code == 200
    prompt = bytes(i for i in last(live).prompt_ids if i < 256)
    assert (b"judged with this" in prompt, b"never seen" in prompt) == (True, False)


WRONG_DEFAULTS: list[tuple[str, object]] = [
    ("temperature", 9),
    ("temperature", "hot"),
    ("temperature", None),
    ("max_tokens", 0),
    ("stop", [""]),
    ("system_prompt", " "),
    ("model", "base"),
    ("messages", []),
    ("stream", True),
    ("nonsense", 1),
    ("response_format", {"type": "poem"}),
    ("system_prompt", "x" * 70_000),
]


def test_a_default_that_no_request_could_ask_is_refused_by_name(acme: httpx.Client) -> None:
    for field, value in WRONG_DEFAULTS:
        wrong = {"name": "chat", "model": "support", "defaults": {field: value}}
        answer = acme.post("/v1/endpoints", json=wrong)
        assert answer.status_code == 400, (field, answer.text)
        assert field in answer.text or "65536" in answer.text
    assert acme.get("/v1/endpoints").json()["data"] == []


def test_a_change_keeps_what_it_does_not_name_and_null_takes_away(acme: httpx.Client) -> None:
    make(acme, defaults={"top_p": 0.5, "seed": 7})
    path = "/v1/endpoints/acme/chat"
    changed = acme.patch(path, json={"defaults": {"seed": None, "top_k": 5}, "reason": "calmer"})
    assert changed.json()["defaults"] == {"top_p": 0.5, "top_k": 5}
    assert changed.json()["model"] == "acme/support@production"
    late = acme.patch(path, json={"model": "base", "expected_generation": 1})
    assert (late.status_code, late.json()["error"]["code"]) == (409, "conflict")
    shown = acme.get(path).json()
    assert [event["action"] for event in shown["history"]] == ["create", "change"]
    assert (shown["history"][-1]["actor"], shown["history"][-1]["reason"]) == ("acme", "calmer")
    assert acme.post("/v1/endpoints", json={"name": "chat", "model": "base"}).status_code == 409


def test_an_endpoint_of_an_adapter_s_name_goes_before_it(acme: httpx.Client, live: Running) -> None:
    make(acme, name="support", defaults={"max_tokens": 2})
    deadline = time.monotonic() + FOLLOWED
    while "x-endpoint" not in asked(acme, "support").headers and time.monotonic() < deadline:
        time.sleep(0.02)
    assert asked(acme, "acme/support").headers["x-endpoint"] == "acme/support"
    assert "x-endpoint" not in asked(acme, "support@production", max_tokens=2).headers
    ids = [card["id"] for card in acme.get("/v1/models").json()["data"]]
    assert ids == [live.services.base.id, "acme/support", "acme/support@production"]


def test_another_tenant_s_endpoint_is_not_there(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    make(acme)
    assert asked(acme, max_tokens=2).status_code == 200
    key = add_key(wardrobe.registry, "beta", SCOPES)
    with httpx.Client(base_url=live.url, headers=bearer(key), timeout=30) as beta:
        for name in ("chat", "nothing"):
            full = f"acme/{name}"
            answer = asked_quick(beta, full)
            said = f"There is no adapter {full} here. GET /v1/models lists what there is."
            assert answer.json()["error"]["message"] == said
            for call in (
                beta.get(f"/v1/endpoints/{full}"),
                beta.patch(f"/v1/endpoints/{full}", json={"model": "base"}),
                beta.delete(f"/v1/endpoints/{full}"),
            ):
                assert call.status_code == 404
                said = f"There is no endpoint {full} here. GET /v1/endpoints lists them."
                assert call.json()["error"]["message"] == said
        taken = beta.post("/v1/endpoints", json={"name": "acme/mine", "model": "base"})
        assert (taken.status_code, taken.json()["error"]["code"]) == (404, "tenant_not_found")
        stolen = beta.post("/v1/endpoints", json={"name": "mine", "model": "acme/support"})
        said = "There is no adapter acme/support here. GET /v1/models lists what there is."
        assert stolen.json()["error"]["message"] == said
        assert len(beta.get("/v1/models").json()["data"]) == 1, "the base"
        assert beta.get("/v1/endpoints").json()["data"] == []
    assert acme.get("/v1/endpoints/acme/chat").json()["generation"] == 1


def asked_quick(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/chat/completions", json=CHAT | {"model": model, "max_tokens": 2})


def test_an_endpoint_uses_what_its_tenant_may_use_whoever_asks(
    live: Running, wardrobe: Wardrobe
) -> None:
    """The operator sees all adapters, and not through an endpoint whose share was taken back."""
    wardrobe.registry.share(NAME, "beta")
    name = AdapterName("beta", "chat")
    wardrobe.registry.create_endpoint(name, Selector.parse("acme/support"), {}, actor="test")
    with live.client() as operator:
        assert asked(operator, "beta/chat", max_tokens=2).status_code == 200
        wardrobe.registry.unshare(NAME, "beta")
        time.sleep(FRESH_SECONDS)
        assert asked_quick(operator, "beta/chat").status_code == 404
        assert asked_quick(operator, "acme/support").status_code == 200


@pytest.mark.parametrize("model", ["support@v2", "support@canary"])
def test_a_target_that_cannot_be_loaded_leaves_the_endpoint_as_it_was(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe, model: str
) -> None:
    make(acme)
    assert asked(acme, max_tokens=2).status_code == 200, "known as it was"
    live.engine.unloadable.add(wardrobe.push(promote=False))
    wardrobe.registry.promote(NAME, 2, alias="canary", reason="test", actor="test")
    acme.patch("/v1/endpoints/acme/chat", json={"model": model})
    deadline = time.monotonic() + FOLLOWED
    while not live.services.endpoints.failures and time.monotonic() < deadline:
        time.sleep(0.02)
    assert asked(acme, max_tokens=2).headers["x-adapter"] == "acme/support@v1"
    told = {each["name"]: each for each in acme.get("/health/ready").json()["failures"]}
    assert "cannot be loaded" in told["acme/chat"]["message"]
    make(acme, name="fresh", model=model)
    never = asked(acme, "fresh", max_tokens=2)
    assert never.status_code == 503, "a new one has nothing to go on as, and says why"
    assert "cannot be loaded" in never.json()["error"]["message"]


def test_a_change_that_fails_in_an_unforeseen_way_is_told_too(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(acme)
    assert asked(acme, max_tokens=2).status_code == 200
    second = wardrobe.push(promote=False)
    warm = ScriptedEngine.warm

    async def broken(engine: ScriptedEngine, adapter: AdapterRef) -> None:
        if adapter.digest == second:
            raise RuntimeError("nobody foresaw this")
        await warm(engine, adapter)

    monkeypatch.setattr(ScriptedEngine, "warm", broken)
    acme.patch("/v1/endpoints/acme/chat", json={"model": "support@v2"})
    deadline = time.monotonic() + FOLLOWED
    while not live.services.endpoints.failures and time.monotonic() < deadline:
        time.sleep(0.02)
    (told,) = acme.get("/health/ready").json()["failures"]
    assert (told["name"], "nobody foresaw this" in told["message"]) == ("acme/chat", True)
    assert asked(acme, max_tokens=2).headers["x-adapter"] == "acme/support@v1"


def test_a_share_of_an_adapter_tells_nothing_of_an_endpoint_that_has_its_name(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    wardrobe.registry.share(NAME, "beta")
    beta = bearer(add_key(wardrobe.registry, "beta", SCOPES))
    live.services.endpoints.failures[NAME] = "acme/secret@v2 cannot be loaded"
    assert "acme/secret" in acme.get("/health/ready").text
    assert httpx.get(f"{live.url}/v1/models/{NAME}", headers=beta).status_code == 200
    assert "acme/secret" not in httpx.get(f"{live.url}/health/ready", headers=beta).text


def test_an_experiment_splits_what_is_asked_for_by_the_endpoint_s_name(
    acme: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    make(acme, defaults={"system_prompt": "be brief", "max_tokens": 2})
    assert asked(acme).status_code == 200
    wardrobe.push(promote=False)
    design = {"treatments": ["@v2"], "metric": "done:binary"}
    made = acme.post("/v1/adapters/acme/support/experiments", json=design)
    assert made.status_code == 201, made.text
    path = f"/v1/experiments/{made.json()['id']}/start"
    assert acme.post(path, json={"reason": "test", "exposure": 1}).status_code == 200
    until(acme, "x-experiment", made.json()["id"])
    ran: dict[str, set[str]] = {}
    for user in range(20):
        answer = asked(acme, user=f"user-{user}")
        assert answer.headers["x-endpoint"] == "acme/chat"
        ran.setdefault(answer.headers["x-adapter"], set()).add(answer.headers["x-arm"])
        prompt = bytes(i for i in last(live).prompt_ids if i < 256)
        assert b"be brief" in prompt, "of every arm"
    assert sorted(ran) == ["acme/support@v1", "acme/support@v2"]
    assert all(len(arms) == 1 for arms in ran.values())


def test_models_lists_endpoints_with_what_they_mean_now(acme: httpx.Client, live: Running) -> None:
    make(acme)
    assert asked(acme, max_tokens=2).status_code == 200
    cards = {card["id"]: card for card in acme.get("/v1/models").json()["data"]}
    assert list(cards) == [live.services.base.id, "acme/chat", "acme/support"]
    card = cards["acme/chat"]
    assert card["root"] == cards["acme/support"]["root"]
    assert card["parent"] == live.services.base.id
    assert (card["endpoint"], card["version"]) == ("acme/support@production", "acme/support@v1")
    assert card == acme.get("/v1/models/chat").json()
    client = live.openai(api_key=acme.headers["authorization"].removeprefix("Bearer "))
    assert "acme/chat" in [model.id for model in client.models.list()]


# By path


def test_a_tenant_s_path_answers_as_the_plain_one_and_only_its_own_keys(
    acme: httpx.Client, live: Running
) -> None:
    make(acme)
    assert asked(acme, max_tokens=2).status_code == 200
    body = CHAT | {"model": "chat", "max_tokens": 2}
    calls = [
        ("POST", "/v1/chat/completions", body),
        ("POST", "/v1/completions", {"model": "chat", "prompt": "a", "max_tokens": 2}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/chat", None),
    ]
    for verb, path, sent in calls:
        here = acme.request(verb, f"/t/acme{path}", json=sent)
        assert here.status_code == 200, (path, here.text)
        for tenant in ("beta", "operator", "ACME"):
            answer = acme.request(verb, f"/t/{tenant}{path}", json=sent)
            assert answer.status_code == 404, (tenant, path)
        with live.client() as operator:
            foreign = operator.request(verb, f"/t/acme{path}", json=sent)
        assert foreign.status_code == 404, "of a key of another tenant, the operator's too"
        assert foreign.json()["error"]["code"] == "tenant_not_found"
        assert httpx.request(verb, f"{live.url}/t/acme{path}", json=sent).status_code == 401
    key = acme.headers["authorization"].removeprefix("Bearer ")
    client = OpenAI(api_key=key, base_url=f"{live.url}/t/acme/v1", max_retries=0)
    said = client.chat.completions.create(**body)
    assert said.choices[0].message.content


# By Host name


@pytest.fixture
def hosted(wardrobe: Wardrobe, tokens: Tokens) -> Iterator[Running]:
    """A server with one adapter and four names."""
    wardrobe.push()
    names = ("*.example.com", "support.acme.org=acme", "api.example.com", "beta.example.net=beta")
    with running(wardrobe, tokens, hosts=tuple(map(AllowedHost.parse, names))) as server:
        yield server


def test_a_host_name_is_a_tenant_s_address_and_opens_nothing_by_itself(
    hosted: Running, wardrobe: Wardrobe
) -> None:
    acme = bearer(add_key(wardrobe.registry, "acme", SCOPES))

    def status(host: str, key: dict[str, str], path: str = "/v1/models", **more: str) -> int:
        return httpx.get(hosted.url + path, headers={**key, **more, "host": host}).status_code

    for host in (
        "acme.example.com",
        "ACME.Example.COM:8443",
        "support.acme.org",
        "api.example.com",
        "localhost:1",
        "127.0.0.1",
    ):
        assert status(host, acme) == 200, host
    for host in ("beta.example.com", "beta.example.net", "operator.example.com"):
        assert status(host, acme) == 404, host
        assert status(host, acme, "/v1/nothing") == 404
    assert status("acme.example.com", hosted.headers) == 404, "not even the operator's key"
    assert status("acme.example.com", {}) == 401
    assert status("acme.example.com", acme, "/t/acme/v1/models") == 200
    assert status("beta.example.com", acme, "/t/acme/v1/models") == 404


STRANGE_HOSTS = [
    "evil.example.org",
    "example.com",
    "a.acme.example.com",
    ".example.com",
    "acme.example.com.",
    "acme.example.com.evil.org",
    "api.example.com@evil.org",
    "evil.org#.example.com",
    "-.example.com",
    "*.example.com",
    "127.0.0.1.evil.org",
    "",
]


def test_a_host_that_is_not_on_the_list_is_refused(hosted: Running) -> None:
    for host in STRANGE_HOSTS:
        answer = httpx.get(f"{hosted.url}/v1/models", headers={**hosted.headers, "host": host})
        code = answer.json()["error"]["code"]
        assert (answer.status_code, code) in ((400, "invalid_host"), (400, "invalid_http")), host


def test_no_forwarded_header_is_believed(hosted: Running, wardrobe: Wardrobe) -> None:
    """Neither lets in what Host does not, nor makes one tenant another."""
    key = add_key(wardrobe.registry, "acme", SCOPES)
    for name in ("x-forwarded-host", "forwarded", "x-original-host", "x-host"):
        value = "host=acme.example.com" if name == "forwarded" else "acme.example.com"
        headers = {**bearer(key), name: value}
        for host, status in (("evil.org", 400), ("beta.example.com", 404), ("localhost", 200)):
            asked = httpx.get(f"{hosted.url}/v1/models", headers={**headers, "host": host})
            assert asked.status_code == status, (name, host)
        other = headers | {name: value.replace("acme", "beta")}
        assert httpx.get(f"{hosted.url}/v1/models", headers=other).status_code == 200


def test_probes_by_address_are_answered_and_told_nothing(hosted: Running) -> None:
    for path in ("/health/live", "/health/ready"):
        answer = httpx.get(hosted.url + path, headers={"host": "10.1.2.3:8000"})
        assert answer.status_code == 200
        assert "failures" not in answer.json()


@pytest.mark.parametrize(
    "text", ["", "a b", "http://a", "a:80", "A.org", "*", "*.a=b", "a=B!", "a="]
)
def test_what_is_no_host_is_refused_when_the_server_starts(text: str) -> None:
    with pytest.raises((HostInvalid, InvalidName)):
        AllowedHost.parse(text)
