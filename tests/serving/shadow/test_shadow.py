"""Shadows on a running server: a candidate answers as well, and nobody notices."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serving.engine.boundary import GenerateRequest, RequestFailed
from serving.shadow import mirror as shadow_mirror
from serving.tenants.keys import EXPERIMENTS, INFER, SCOPES, add_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, NAME, Running, Wardrobe, eventually, running
from tests.serving.scripted import ScriptedEngine, repeat_label, says
from tests.serving.test_prompt_versions import push_prompt
from wardrobe import app

PATH = "/v1/adapters/acme/support/shadow"
SECRET = "the-dragon-sleeps-at-noon"


def ask(live: Running, unit: str | None = None, **fields: Any) -> httpx.Response:
    headers = {"x-unit-key": unit} if unit else {}
    messages = [{"role": "user", "content": SECRET}]
    body = CHAT | {"model": "acme/support", "max_tokens": 20, "messages": messages}
    with live.client() as client:
        return client.post(
            "/v1/chat/completions", json=body | {"temperature": 0} | fields, headers=headers
        )


def start(live: Running, candidate: str = "@v2", share: float = 1.0) -> dict[str, Any]:
    """Begin a shadow and wait until this server mirrors."""
    with live.client() as client:
        made = client.post(PATH, json={"candidate": candidate, "share": share})
    assert made.status_code == 201, made.text
    eventually(lambda: chosen(live, range(100)) or report(live)["state"] == "stopped")
    return made.json()


def chosen(live: Running, numbers: range) -> list[int]:
    """Return which of the users are mirrored."""
    digest = live.services.live.versions[NAME, "production"].digest
    choose = live.services.shadows.choose
    return [n for n in numbers if choose(NAME, digest, f"operator\x1fuser {n}")]


def report(live: Running) -> dict[str, Any]:
    with live.client() as client:
        return client.get(PATH).json()


def pairs(live: Running, count: int) -> dict[str, Any]:
    """Wait for so many pairs; return the report."""

    def enough() -> dict[str, Any] | None:
        facts = report(live)
        return facts if facts["pairs"] >= count else None

    return eventually(enough)


def measure(facts: dict[str, Any], name: str) -> float:
    return next(m["value"] for m in facts["measures"] if m["measure"] == name)


@pytest.fixture
def two(wardrobe: Wardrobe, tokens: Tokens) -> Iterator[Running]:
    """A server with acme/support@v1 in production and @v2 pushed."""
    wardrobe.push()
    wardrobe.push(promote=False)
    with running(wardrobe, tokens) as live:
        yield live


def test_the_candidate_answers_as_well_and_the_report_compares_token_by_token(
    two: Running,
) -> None:
    start(two)
    whole, streamed = ask(two), ask(two, stream=True)
    raw = {"model": "acme/support", "prompt": "hi", "max_tokens": 20, "temperature": 0}
    completed = two.post(raw, "/v1/completions")
    for answer in (whole, streamed, completed):
        assert answer.status_code == 200
        assert answer.headers["x-adapter"] == "acme/support@v1"
    assert whole.json()["choices"][0]["message"]["content"] == "acme/support@v1 acme"
    facts = pairs(two, 3)
    assert facts["production"]["version"] == "acme/support@v1"
    assert facts["candidate"]["version"] == "acme/support@v2"
    # acme/support@v1 acme and acme/support@v2 acme differ in the 15th of 20 tokens.
    assert measure(facts, "prefix") == pytest.approx(14 / 20)
    assert measure(facts, "equal") == pytest.approx(19 / 20)
    assert measure(facts, "same") == measure(facts, "failed") == measure(facts, "length") == 0
    # The scripted candidate gives each of its tokens −0.5, and −1.5 to −4.5 to the four after it:
    # production's "1" is not among them.
    assert measure(facts, "logprob") == pytest.approx((14 * -0.5 - 4.5) / 15)
    assert facts["sentences"][0] == "3 pairs of 3 units."


def test_what_is_mirrored_is_another_request_of_low_priority_with_the_same_numbers(
    two: Running,
) -> None:
    seen: list[GenerateRequest] = []

    def noting(request: GenerateRequest) -> Iterator[int]:
        seen.append(request)
        return repeat_label(request)

    two.engine.script = noting
    start(two)
    ask(two, temperature=1, seed=7, presence_penalty=0.5, stop=["x"], n=2)
    ask(two, temperature=1)
    pairs(two, 2)
    asked = [r for r in seen if not r.request_id.startswith("selfcheck")]
    low = [r for r in asked if r.priority == "low"]
    assert [r.priority for r in asked].count("normal") == 3
    assert {r.adapter.label for r in low if r.adapter} == {"acme/support@v2"}
    for shadow in low:
        [twin] = [r for r in asked if f"shadow-{r.request_id}" == shadow.request_id]
        assert twin.prompt_ids == shadow.prompt_ids
        assert twin.tenant == shadow.tenant
        assert twin.sampling.seed == shadow.sampling.seed is not None
        assert twin.sampling.presence_penalty == shadow.sampling.presence_penalty


def test_a_unit_is_always_mirrored_or_never(two: Running) -> None:
    start(two, share=0.3)
    users = chosen(two, range(200))
    assert 30 <= len(users) <= 90, "about 60 of 200"
    for _ in range(3):
        for number in (*users[:5], *(set(range(12)) - set(users))):
            assert ask(two, f"user {number}").status_code == 200

    def all_told() -> dict[str, Any] | None:
        facts = report(two)
        told = facts["pairs"] + facts["skipped"].get("busy", 0)
        return facts if told == 15 else None

    assert eventually(all_told)["units"] <= 5


def test_a_candidate_that_fails_fails_for_nobody_and_is_counted(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    wardrobe.push()
    wardrobe.push(promote=False)

    def breaking(request: GenerateRequest) -> Iterator[int]:
        if request.priority == "low":
            yield from b"acme"
            raise RequestFailed("the script says that the candidate fails here")
        yield from repeat_label(request)

    with running(wardrobe, tokens) as off:
        plain = [ask(off, f"u{n}").json()["choices"] for n in range(10)]
    with running(wardrobe, tokens, ScriptedEngine(breaking)) as live:
        start(live)
        answers = [ask(live, f"u{n}") for n in range(10)]
        facts = pairs(live, 10)
        with live.client() as client:
            text = client.get("/metrics").text
    assert [answer.json()["choices"] for answer in answers] == plain
    assert measure(facts, "failed") == 1
    assert "The candidate failed on 100.0 %." in facts["sentences"]
    assert 'wardrobe_shadow_requests_total{result="failed"} 10.0' in text
    assert 'wardrobe_requests_total{route="/v1/chat/completions",status="200"} 10.0' in text


def test_a_candidate_that_cannot_be_loaded_ends_the_shadow_and_says_why(
    two: Running, wardrobe: Wardrobe
) -> None:
    two.engine.unloadable.add(wardrobe.registry.versions(NAME)[1].digest)
    start(two)
    facts = eventually(lambda: (f := report(two))["state"] == "stopped" and f)
    assert "cannot be loaded" in facts["reason"]
    assert ask(two).status_code == 200


def test_what_comes_while_enough_are_mirrored_is_dropped_and_counted(
    two: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_mirror, "MAX_IN_FLIGHT", 1)
    gate = {"open": False}

    def slow(request: GenerateRequest) -> Iterator[int]:
        yield from b"acme"
        while request.priority == "low" and not gate["open"]:
            yield 32
        yield from repeat_label(request)

    start(two)
    two.engine.script = slow
    two.engine.step_seconds = 0.001
    for _ in range(5):
        assert ask(two, max_tokens=400).status_code == 200
    gate["open"] = True
    facts = eventually(lambda: (f := report(two))["pairs"] + f["skipped"].get("busy", 0) == 5 and f)
    assert facts["pairs"] >= 1


def test_an_answer_that_does_not_come_to_its_end_makes_no_pair(two: Running) -> None:
    start(two)
    two.engine.fail_after = 5
    assert ask(two).status_code == 500
    two.engine.fail_after = None
    facts = eventually(lambda: (f := report(two))["skipped"] and f)
    assert facts["skipped"] == {"unfinished": 1}
    assert facts["pairs"] == 0
    eventually(lambda: not two.engine.running)


def test_another_version_in_production_is_not_compared(two: Running, wardrobe: Wardrobe) -> None:
    start(two)
    wardrobe.promote(2)
    eventually(lambda: ask(two).headers["x-adapter"] == "acme/support@v2")
    facts = eventually(lambda: (f := report(two))["skipped"].get("other") and f)
    assert "another version answered" in facts["sentences"][-1]
    assert ask(two, model="acme/support@v1").status_code == 200, "a version that is named"


def test_a_prompt_goes_before_the_messages_and_has_no_place_in_a_raw_prompt(
    two: Running, wardrobe: Wardrobe
) -> None:
    digest = push_prompt(wardrobe, system="Be brief.")
    start(two, candidate=f"@sha256:{digest}")
    ask(two)
    two.post(
        {"model": "acme/support", "prompt": "hi", "max_tokens": 4, "temperature": 0},
        "/v1/completions",
    )
    facts = pairs(two, 1)
    assert eventually(lambda: report(two)["skipped"]) == {"raw": 1}
    assert measure(facts, "failed") == 0


def test_format_is_judged_where_production_answers_in_json(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    wardrobe.push()
    wardrobe.push(promote=False)

    def speaking(request: GenerateRequest) -> Iterator[int]:
        text = '{"on": true' if request.priority == "low" else '{"on": true}'
        return says(text)(request)

    with running(wardrobe, tokens, ScriptedEngine(speaking)) as live:
        start(live)
        assert ask(live).json()["choices"][0]["message"]["content"] == '{"on": true}'
        facts = pairs(live, 1)
    assert measure(facts, "json") == -1
    assert any("0 of 1 of the candidate's are JSON" in said for said in facts["sentences"])


def test_only_its_tenant_begins_sees_and_stops_a_shadow(two: Running, wardrobe: Wardrobe) -> None:
    acme = add_key(wardrobe.registry, "acme", [EXPERIMENTS])
    weak = add_key(wardrobe.registry, "acme", [INFER])
    beta = add_key(wardrobe.registry, "beta", SCOPES)

    def call(key: str, verb: str, path: str, body: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(verb, two.url + path, json=body, headers=headers, timeout=30)

    begin = {"candidate": "@v2", "share": 0.5}
    assert call(beta, "POST", PATH, begin).status_code == 404
    assert call(weak, "POST", PATH, begin).status_code == 403
    assert call(acme, "POST", PATH, {"candidate": "beta/legal"}).status_code == 400
    for share in (0, -1, 1.5):
        assert call(acme, "POST", PATH, begin | {"share": share}).status_code == 400
    assert call(acme, "GET", PATH).status_code == 404
    assert call(acme, "POST", PATH, begin).status_code == 201
    assert call(acme, "POST", PATH, begin).status_code == 409
    assert call(beta, "GET", PATH).status_code == 404
    assert call(beta, "GET", "/v1/shadows").json()["data"] == []
    assert len(call(acme, "GET", "/v1/shadows").json()["data"]) == 1
    assert call(beta, "POST", f"{PATH}/stop", {"reason": "x"}).status_code == 404
    stopped = call(acme, "POST", f"{PATH}/stop", {"reason": "seen enough"}).json()
    assert (stopped["state"], stopped["reason"]) == ("stopped", "seen enough")
    assert call(acme, "POST", PATH, begin).status_code == 201, "the next one may begin"


def test_production_is_not_compared_with_itself(two: Running, wardrobe: Wardrobe) -> None:
    with two.client() as client:
        answer = client.post(PATH, json={"candidate": "@v1", "share": 0.5})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "candidate")
    home = ["--home", str(wardrobe.registry.home)]
    start_it = ["shadow", "start", "acme/support", "--candidate", "@production", *home]
    there = {"WARDROBE_CACHE": str(wardrobe.folder)}  # the bases
    said = CliRunner().invoke(app, start_it, env=there).stderr.replace("\n", " ")
    for words in (error["message"], said):
        assert "is acme/support@v1, what production of acme/support is now" in words
        assert " arm" not in words


def test_what_a_shadow_generates_is_in_no_usage(two: Running) -> None:
    start(two)
    told = [ask(two, f"u{n}").json()["usage"] for n in range(4)]
    assert pairs(two, 1)["pairs"] >= 1
    with two.client() as client:
        [row] = client.get("/v1/usage").json()["data"]
    for kind in ("prompt_tokens", "completion_tokens"):
        assert row[kind] == sum(usage[kind] for usage in told)
    assert row["answers"] == 4


def test_neither_prompt_nor_answer_of_a_mirrored_request_is_kept(
    two: Running, wardrobe: Wardrobe
) -> None:
    two.engine.script = says("a secret answer")
    start(two)
    ask(two)
    pairs(two, 1)
    home = b"".join(p.read_bytes() for p in wardrobe.registry.home.rglob("*") if p.is_file())
    assert b"shadow" in home
    assert SECRET.encode() not in home
    assert b"a secret answer" not in home
