"""The request log of a running server: facts always, what was said only where it is wanted."""

import logging
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.logs.entry import LogSettings
from serving.logs.store import Logged, Logs, Wanted
from serving.tenants.keys import FEEDBACK, INFER, LOGS, READ, SCOPES, add_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, eventually, running

SECRET = "the-dragon-sleeps-at-noon"  # what nobody but the tenant may know
SAID = "acme/support@v1"  # what the scripted engine says for it


def ask(live: Running, key: str, content: str = SECRET, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    body = CHAT | {"model": "acme/support", "max_tokens": 20, "messages": messages} | fields
    return httpx.post(
        f"{live.url}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {key}"},
        timeout=30,
    )


def logged(live: Running, answer: httpx.Response) -> Logged:
    """Wait for the line of an answer."""
    wanted = Wanted(request_id=answer.headers["x-request-id"])
    return eventually(lambda: live.services.logs.find(wanted))[0]


def written(home: Path) -> bytes:
    """Every byte of every file under the home."""
    files = [path for path in home.rglob("*") if path.is_file()]
    assert len(files) > 3, "an empty home would prove nothing"
    return b"".join(path.read_bytes() for path in files)


def opt_in(live: Running, **changes: Any) -> None:
    live.services.logs.set(replace(LogSettings("acme", sample=1.0), **changes))
    eventually(lambda: live.services.log_writer.keeps("acme", "req_00000000"))


@pytest.fixture
def acme(wardrobe: Wardrobe) -> str:
    return add_key(wardrobe.registry, "acme", SCOPES)


def test_every_request_is_in_the_log_with_its_facts_and_without_any_text(
    live: Running, wardrobe: Wardrobe, acme: str
) -> None:
    whole = ask(live, acme)
    streamed = ask(live, acme, stream=True)
    wrong = ask(live, acme, temperature=99)
    missing = ask(live, acme, model=f"acme/{SECRET}")
    stranger = ask(live, "wr_" + SECRET)

    line = logged(live, whole).entry
    assert (line.tenant, line.method, line.route) == ("acme", "POST", "/v1/chat/completions")
    assert (line.adapter, line.version) == ("acme/support", "acme/support@v1")
    assert f"sha256:{line.digest}" == whole.headers["x-adapter-digest"]
    usage = whole.json()["usage"]
    assert (line.prompt_tokens, line.completion_tokens) == (usage["prompt_tokens"], 20)
    assert (line.status, line.outcome, line.finish) == (200, "", "length")
    assert line.first_token_ms is not None
    assert 0 < line.first_token_ms <= line.ms
    same = ("version", "prompt_tokens", "completion_tokens", "finish", "status")
    other = logged(live, streamed).entry
    assert [getattr(other, name) for name in same] == [getattr(line, name) for name in same]
    assert (logged(live, wrong).entry.status, logged(live, missing).entry.status) == (400, 404)
    refused = logged(live, stranger).entry
    assert (refused.status, refused.tenant, refused.outcome) == (401, "", "invalid_api_key")

    assert all(line.contents is None for line in live.services.logs.find(Wanted()))
    assert SECRET.encode() not in written(wardrobe.registry.home)
    assert SAID.encode() in written(wardrobe.registry.home), "a version's name is no secret"


def test_probes_fill_no_log(live: Running, acme: str) -> None:
    httpx.get(f"{live.url}/health/live")
    last = ask(live, acme)
    logged(live, last)
    assert {line.entry.route for line in live.services.logs.find(Wanted())} == {
        "/v1/chat/completions"
    }


def test_no_key_is_ever_written_or_sent_back_wherever_a_client_puts_it(
    live: Running, wardrobe: Wardrobe, acme: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    opt_in(live)
    bodies = [
        ask(live, acme, content=f"my key is {acme}, keep it"),
        ask(live, acme, model=acme),
        ask(live, acme, **{acme: "1"}),
        ask(live, acme, user=acme, metadata={"k": acme}),
        httpx.get(f"{live.url}/v1/models/{acme}", headers={"authorization": f"Bearer {acme}"}),
        httpx.get(f"{live.url}/{acme}?key={acme}", headers={"authorization": acme}),
        httpx.get(f"{live.url}/v1/logs/{acme}", headers={"authorization": f"Bearer {acme}"}),
    ]
    assert [answer.status_code for answer in bodies] == [200, 404, 400, 200, 404, 404, 404]
    for answer in bodies:
        logged(live, answer)
    secret = acme.split("_")[2]
    assert not [answer.text for answer in bodies if secret in answer.text]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("wardrobe")]
    assert len(ours) >= len(bodies)  # the client in this process writes what it sends, too
    assert not [line for line in ours if secret in line]
    assert secret.encode() not in written(wardrobe.registry.home)
    kept = logged(live, bodies[0]).contents
    assert kept is not None
    assert kept.prompt[0]["content"] == "my key is [key], keep it"


def test_what_is_said_is_kept_where_the_tenant_wants_it_and_nowhere_else(
    live: Running, wardrobe: Wardrobe, acme: str
) -> None:
    beta = add_key(wardrobe.registry, "beta", SCOPES)
    opt_in(live, patterns={"dragon": "dragon|wyvern"})
    said = "the dragon is at ann@example.org or +49 30 1234567, order 12"
    mine = logged(live, ask(live, acme, content=said, n=2))
    assert mine.contents is not None
    assert mine.contents.prompt == (
        {"role": "user", "content": "the [dragon] is at [email] or +[digits], order 12"},
    )
    assert mine.contents.answers == (f"{SAID} acme",) * 2
    streamed = logged(live, ask(live, acme, content=said, stream=True)).contents
    assert streamed is not None
    assert streamed.answers == (f"{SAID} acme",)
    raw = {"model": "acme/support", "prompt": [104, 105], "max_tokens": 4}
    answer = httpx.post(
        f"{live.url}/v1/completions", json=raw, headers={"authorization": f"Bearer {acme}"}
    )
    completed = logged(live, answer).contents
    assert completed is not None
    assert completed.prompt == ({"role": "prompt", "content": "hi"},)
    assert logged(live, ask(live, beta, model="base")).contents is None
    assert SECRET.encode() not in written(wardrobe.registry.home)


def test_who_turns_it_off_leaves_no_byte_of_what_was_said(
    live: Running, wardrobe: Wardrobe, acme: str
) -> None:
    opt_in(live)
    answers = [ask(live, acme) for _ in range(30)]
    assert logged(live, answers[-1]).contents is not None
    assert SECRET.encode() in written(wardrobe.registry.home), "else the next line proves nothing"
    live.services.logs.set(LogSettings("acme", sample=0.0))
    last = ask(live, acme)  # the server may not have read the settings yet
    assert logged(live, last).contents is None
    assert SECRET.encode() not in written(wardrobe.registry.home)
    assert len(live.services.logs.find(Wanted("acme"))) == 31, "the facts stay"


def test_a_locked_database_costs_no_request_and_no_line(
    live: Running, wardrobe: Wardrobe, acme: str
) -> None:
    logged(live, ask(live, acme))
    lock = sqlite3.connect(wardrobe.registry.home / "logs.sqlite", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    answers = [ask(live, acme) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
    lock.execute("ROLLBACK")
    lock.close()
    for answer in answers:
        logged(live, answer)


def test_a_tenant_reads_its_own_log_with_a_key_for_it(
    live: Running, wardrobe: Wardrobe, acme: str
) -> None:
    opt_in(live)
    beta = add_key(wardrobe.registry, "beta", [LOGS, INFER])
    weak = add_key(wardrobe.registry, "acme", [INFER, READ, FEEDBACK])
    mine, other = ask(live, acme), ask(live, beta, model="base")
    logged(live, mine)
    logged(live, other)

    def get(key: str, path: str = "/v1/logs") -> httpx.Response:
        return httpx.get(f"{live.url}{path}", headers={"authorization": f"Bearer {key}"})

    [line] = get(acme).json()["data"]
    assert line["request_id"] == mine.headers["x-request-id"]
    assert "contents" not in line
    one = get(acme, f"/v1/logs/{line['request_id']}").json()
    assert one["contents"]["prompt"] == [{"role": "user", "content": SECRET}]
    assert get(beta, f"/v1/logs/{line['request_id']}").status_code == 404
    assert get(weak).status_code == 403
    ids = [entry["request_id"] for entry in get(live.key, "/v1/logs").json()["data"]]
    assert {mine.headers["x-request-id"], other.headers["x-request-id"]} <= set(ids)
    page = get(live.key, "/v1/logs?limit=1&adapter=acme/support&contents=true").json()
    assert (len(page["data"]), page["has_more"]) == (1, True)
    assert page["data"][0]["contents"]["answers"] == [f"{SAID} acme"]
    before = f"/v1/logs?limit=1&adapter=acme/support&before={page['data'][0]['seq']}"
    assert get(live.key, before).json()["data"] == []
    for wrong in ("limit=0", "limit=1001", "limit=x", "before=0", "last=5"):
        refused = get(acme, f"/v1/logs?{wrong}")
        assert refused.status_code == 400
        assert wrong.partition("=")[0] in refused.json()["error"]["message"]


def test_the_log_is_whole_after_the_server_has_stopped(
    wardrobe: Wardrobe, tokens: Tokens, acme: str
) -> None:
    wardrobe.push()
    with running(wardrobe, tokens) as live:
        answers = [ask(live, acme) for _ in range(10)]
    with Logs(wardrobe.registry.home) as logs:
        ids = {line.entry.request_id for line in logs.walk(Wanted())}
    assert ids == {answer.headers["x-request-id"] for answer in answers}
