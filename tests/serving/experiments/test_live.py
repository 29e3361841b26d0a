"""Experiments on a running server: real requests, real feedback, and what is done about it."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.adapter import AdapterName
from serving.experiments import live as live_experiments
from serving.experiments import recorder
from serving.experiments.answers import Counts
from serving.experiments.decide import Verdict
from serving.experiments.experiment import Experiment
from serving.experiments.live import POLL_SECONDS
from serving.experiments.store import Experiments
from serving.tenants.keys import SCOPES, add_key
from serving.tokens import Tokens
from tests.registry.making import make_adapter
from tests.serving.live import CHAT, NAME, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine, says
from tests.serving.test_prompt_versions import push_prompt

OTHER = AdapterName("acme", "other")
PATH = "/v1/adapters/acme/support/experiments"
DESIGN = {"treatments": ["@v2"], "metric": "solved:binary"}


@pytest.fixture
def client(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    """A client of acme, whose adapter has v1 in production and v2 pushed."""
    wardrobe.push(promote=False)
    key = add_key(wardrobe.registry, "acme", SCOPES)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as client:
        yield client


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
    wait_for(lambda: not everybody or "x-experiment" in ask(client, "waiting").headers)
    return experiment


def act(client: httpx.Client, experiment: str, action: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/experiments/{experiment}/{action}", json={"reason": "x"} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


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


def test_units_are_split_and_each_keeps_its_arm(client: httpx.Client) -> None:
    experiment = start(client)
    seen: dict[str, set[str]] = {}
    for _ in range(3):
        for number in range(40):
            answer = ask(client, f"user {number}")
            assert answer.headers["x-experiment"] == experiment
            version = {"control": "acme/support@v1", "treatment": "acme/support@v2"}
            arm = answer.headers["x-arm"]
            assert answer.headers["x-adapter"] == version[arm] == answer.json()["model"]
            assert version[arm].startswith(answer.json()["choices"][0]["message"]["content"])
            seen.setdefault(f"user {number}", set()).add(arm)
    assert all(len(arms) == 1 for arms in seen.values())
    assert set.union(*seen.values()) == {"control", "treatment"}
    facts = client.get(f"/v1/experiments/{experiment}").json()
    assert sum(facts["units"]) == 41, "40 users and the one that waited for the start"
    assert sum(facts["answers"]) >= 121
    assert facts["notes"] == []


def test_selectors_that_name_a_version_are_left_alone(client: httpx.Client) -> None:
    start(client, share=0.99)
    for model in ("acme/support@v1", "base"):
        answers = [ask(client, f"u{n}", model=model) for n in range(10)]
        assert {a.headers.get("x-experiment") for a in answers} == {None}
    assert {ask(client, f"u{n}", model="support").headers["x-arm"] for n in range(40)} >= {
        "treatment"
    }


def test_a_request_without_a_unit_counts_alone_and_the_report_says_so(client: httpx.Client) -> None:
    experiment = start(client)
    arms = {ask(client).headers["x-arm"] for _ in range(30)}
    assert arms == {"control", "treatment"}, "one client without a key meets both"
    named = {ask(client, user="ann").headers["x-arm"] for _ in range(5)}
    assert len(named) == 1, "OpenAI's `user` is a unit"
    assert {ask(client, safety_identifier="ann").headers["x-arm"] for _ in range(3)} == named
    assert "named no unit" in client.get(f"/v1/experiments/{experiment}").json()["notes"][0]


def test_streams_and_errors_have_their_outcome(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    experiment = start(client)
    ask(client, "streams", stream=True)
    live.engine.fail_after = 3
    assert ask(client, "fails").status_code == 500
    live.engine.fail_after = None
    with Experiments(wardrobe.registry.home) as store:
        found = store.get(experiment)

        def ended() -> bool:
            counts = store.counts(found)
            return sum(c.metrics["errors"].x for c in counts) == sum(c.answers for c in counts)

        wait_for(ended)
        assert sum(c.metrics["errors"].y for c in store.counts(found)) == 1


def test_feedback_reaches_the_arm_and_only_the_owner_gives_it(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    experiment = start(client)
    request_id = ask(client, "ann").headers["x-request-id"]
    body = {"request_id": request_id, "metric": "solved", "value": 1, "idempotency_key": "k"}
    assert client.post("/v1/feedback", json=body).json()["recorded"] is True
    assert client.post("/v1/feedback", json=body).json()["recorded"] is False
    wrong = client.post("/v1/feedback", json=body | {"value": 3, "idempotency_key": "l"})
    assert wrong.status_code == 400
    beta = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    with httpx.Client(base_url=live.url, headers=beta) as other:
        answer = other.post("/v1/feedback", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, None)
        assert other.get(f"/v1/experiments/{experiment}").status_code == 404
        assert other.get("/v1/experiments").json()["data"] == []
        assert (
            other.post(f"/v1/experiments/{experiment}/stop", json={"reason": "x"}).status_code
            == 404
        )
        assert other.post(PATH, json=DESIGN).status_code == 404
    facts = client.get(f"/v1/experiments/{experiment}").json()
    solved = next(m for m in facts["metrics"] if m["metric"] == "solved")
    assert solved["control"] + solved["treated"] > 0


def test_a_blind_experiment_does_not_say_which_arm_it_was(client: httpx.Client) -> None:
    experiment = start(client, blind=True)
    for number in range(20):
        answer = ask(client, f"u{number}")
        assert answer.headers["x-adapter"] == experiment == answer.json()["model"]
        assert {"x-adapter-digest", "x-arm"}.isdisjoint(answer.headers)
        assert "v1" not in answer.json()["system_fingerprint"]


def test_a_blind_arm_that_refuses_does_not_say_its_name(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    push_prompt(wardrobe)
    experiment = start(client, blind=True, treatments=["@v3"])
    body = {"model": "acme/support", "prompt": "a", "max_tokens": 2}
    answers = [client.post("/v1/completions", json=body) for _ in range(20)]
    refused = [a.json()["error"]["message"] for a in answers if a.status_code == 400]
    assert refused, "a prompt has no place in a raw prompt"
    assert all(experiment in text and "@v" not in text for text in refused)


def test_a_bad_version_is_taken_back_by_itself_and_no_request_fails(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    """A tenth of the users take part; half of them meet a version that makes everybody angry."""
    wardrobe.push()
    bad = wardrobe.push(promote=False)
    engine = ScriptedEngine()
    with running(wardrobe, tokens, engine) as live:
        headers = {"authorization": f"Bearer {live.key}"}
        with httpx.Client(base_url=live.url, headers=headers, timeout=30) as client:
            experiment = start(client, 0.1, guardrails=["angry:binary:lower"])
            harmed = 0
            for number in range(1500):
                answer = ask(client, f"user {number}")
                assert answer.status_code == 200
                if "x-arm" not in answer.headers:
                    continue
                angry = answer.headers["x-arm"] == "treatment"
                assert angry == (answer.headers["x-adapter-digest"] == f"sha256:{bad}")
                harmed += angry
                said = {"request_id": answer.headers["x-request-id"], "metric": "angry"}
                client.post("/v1/feedback", json=said | {"value": int(angry)})
                if number % 50 == 49 and state(client, experiment) == "stopped":
                    break
            wait_for(lambda: state(client, experiment) == "stopped")
            after = [ask(client, f"user {n}") for n in range(30)]
            facts = client.get(f"/v1/experiments/{experiment}").json()
    assert {a.headers["x-adapter"] for a in after} == {"acme/support@v1"}
    last = facts["decisions"][-1]
    assert (last["action"], last["actor"]) == ("stop harmed", "wardrobe")
    assert "angry" in last["reason"]
    units = last["numbers"]["units"][1]
    assert 0 < units <= harmed, "the log tells how many were harmed"
    assert f"{units} units had met it" in last["reason"]


def test_the_server_moves_a_ramp_and_nobody_changes_arm(client: httpx.Client) -> None:
    made = client.post(PATH, json=DESIGN | {"ramp": ["0.1:0s:3", "0.4:0s:12", "1"]}).json()["id"]
    assert act(client, made, "start")["exposure"] == 0.1
    seen: dict[str, set[str]] = {}

    def everybody_took_part() -> bool:
        for unit in map(str, range(60)):
            headers = ask(client, unit).headers
            if "x-arm" in headers:
                seen.setdefault(unit, set()).add(headers["x-arm"])
        return len(seen) == 60

    wait_for(everybody_took_part)
    assert all(len(arms) == 1 for arms in seen.values())
    log = client.get(f"/v1/experiments/{made}").json()["decisions"]
    moves = [d for d in log if d["action"] == "ramp"]
    assert [d["actor"] for d in moves] == ["wardrobe", "wardrobe"]
    assert sum(moves[0]["numbers"]["units"]) >= 3
    assert "0.4:0s:12" in moves[0]["reason"]


def test_a_database_that_is_held_is_not_waited_for(
    client: httpx.Client, live: Running, wardrobe: Wardrobe, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(client)
    monkeypatch.setattr(recorder, "EXPOSE_SECONDS", 0.25)
    with sqlite3.connect(wardrobe.registry.home / "experiments.sqlite") as holder:
        holder.execute("BEGIN IMMEDIATE")
        answer = ask(client, "user 1")
        holder.rollback()
    assert answer.status_code == 200
    assert "x-arm" not in answer.headers, "production, and not counted"
    wait_for(lambda: "x-arm" in ask(client, "user 1").headers)
    metrics = httpx.get(f"{live.url}/metrics", headers=live.headers).text
    assert 'wardrobe_exposures_total{written="no"}' in metrics


def test_two_experiments_of_a_layer_share_no_user_and_the_holdout_is_in_neither(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    assert client.put("/v1/layers/acme/main", json={"holdout": 0.2}).status_code == 201
    design = DESIGN | {"layer": "main", "layer_share": 0.4}
    first, second = (start(client, layer="main", layer_share=0.4) for _ in range(2))
    refused = client.post(PATH, json=design)
    assert refused.status_code == 409
    assert first in refused.json()["error"]["message"]

    def both() -> bool:
        return {ask(client, f"u{n}").headers.get("x-experiment") for n in range(30)} >= {
            first,
            second,
        }

    wait_for(both)
    met = [ask(client, f"u{n}").headers.get("x-experiment") for n in range(150)]
    again = [ask(client, f"u{n}").headers.get("x-experiment") for n in range(150)]
    assert met == again
    # 60, 60 and 30, with five standard deviations around them
    assert 30 <= met.count(first) <= 90
    assert 30 <= met.count(second) <= 90
    assert 5 <= met.count(None) <= 55
    free = client.get("/v1/layers/acme/main").json()["free"]
    assert free == []
    beta = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    other = client.get("/v1/layers/acme/main", headers=beta)
    unknown = client.get("/v1/layers/acme/nothing", headers=beta)
    assert (other.status_code, unknown.status_code) == (404, 404)
    act(client, first, "stop")
    assert client.post(PATH, json=design).status_code == 201, "its part is free again"


def test_people_say_it_in_words_and_their_answers_become_rows(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    experiment = start(client)
    request_id = ask(client, "ann").headers["x-request-id"]
    said = {"request_id": request_id, "metric": "comment", "value": "too | short"}
    assert client.post("/v1/feedback", json=said).json()["recorded"] is True
    shown = {
        "request_id": request_id,
        "metric": "demonstration",
        "value": "the right answer",
        "messages": [{"role": "user", "content": "hello"}],
        "idempotency_key": "k",
    }
    assert client.post("/v1/feedback", json=shown).json()["recorded"] is True
    assert client.post("/v1/feedback", json=shown).json()["recorded"] is False
    for wrong in (
        said | {"value": 1},
        said | {"metric": "solved"},
        shown | {"messages": []},
        shown | {"messages": [{"role": "assistant", "content": "hello"}]},
        said | {"messages": shown["messages"]},
        shown | {"metric": "solved", "value": 1},
    ):
        assert client.post("/v1/feedback", json=wrong).status_code == 400, wrong
    beta = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    assert client.post("/v1/feedback", json=said, headers=beta).status_code == 404
    wardrobe.registry.share(NAME, "beta")
    wait_for(lambda: "x-arm" in ask(client, "ann", headers=beta).headers)
    theirs = ask(client, "ann", headers=beta).headers["x-request-id"]
    for words in (said, shown):
        refused = client.post("/v1/feedback", json=words | {"request_id": theirs}, headers=beta)
        assert (refused.status_code, "read by acme" in refused.text) == (400, True)
    path = "/v1/adapters/acme/support/demonstrations"
    assert client.get(path, headers=beta).status_code == 404
    page = client.get(path).json()
    (row,) = page["data"]
    assert client.get(path, params={"after": page["after"]}).json()["data"] == []
    assert row["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the right answer"},
    ]
    assert row["made"]["request_id"] == request_id
    page = client.get(f"/v1/experiments/{experiment}/report")
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    assert "too \\| short" in page.text
    assert "the right answer" not in page.text


def test_answers_that_are_not_json_and_what_answers_cost_are_counted(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    design = {"guardrails": ["malformed"], "signals": ["cost"], "prices": [1e6, 2e6]}
    live.engine.script = says('{"on": true}')
    experiment = start(client, **design)
    live.engine.script = says("{on")
    assert ask(client, "u").json()["choices"][0]["message"]["content"] == "{on"
    ask(client, "streams", stream=True)
    with Experiments(wardrobe.registry.home) as store:
        found = store.get(experiment)

        def answers(name: str) -> list[float]:
            sums = [counts.metrics[name] for counts in store.counts(found)]
            return [sum(s.y for s in sums), sum(s.x for s in sums)]

        wait_for(lambda: sum(c.unended for c in store.coverage(found)) == 0)
        malformed, ended = answers("malformed")
        assert (malformed, ended > 2) == (2, True)
        tokens = store.counts(found)
        assert tokens
        assert answers("cost")[0] > 3 * ended, "prompt tokens once, and generated tokens twice"


def test_the_power_of_a_design_is_known_before_it_starts(client: httpx.Client) -> None:
    made = client.post(PATH, json=DESIGN | {"least_effect": 0.03, "ramp": ["0.1:1d", "1"]}).json()
    path = f"/v1/experiments/{made['id']}/power"
    found = client.get(path, params={"units_per_day": 1000, "baseline": 0.1}).json()
    assert 4000 < found["units"] < 12000
    assert found["days"] == pytest.approx(1 + (found["units"] - 100) / 1000)
    assert client.get(path, params={"units_per_day": 1000}).status_code == 400


def test_a_winner_is_promoted_where_the_design_says_so(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    experiment = start(client, on_win="promote")
    solve(client)
    wait_for(lambda: state(client, experiment) == "stopped")
    wait_for(lambda: ask(client, "anybody").headers["x-adapter"] == "acme/support@v2")
    last = wardrobe.registry.history(NAME)[-1]
    assert (last.number, last.actor) == (2, "wardrobe")
    assert experiment in last.reason


def test_production_that_is_moved_goes_before_the_experiment(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    """Whoever rolls back what is broken must not find it served on as a control."""
    experiment = start(client)
    wardrobe.push()
    wait_for(lambda: ask(client, "u").headers["x-adapter"] == "acme/support@v3")
    answers = [ask(client, f"user {number}") for number in range(20)]
    assert {a.headers["x-adapter"] for a in answers} == {"acme/support@v3"}
    assert {a.headers.get("x-arm") for a in answers} == {None}
    wait_for(lambda: state(client, experiment) == "paused")
    last = client.get(f"/v1/experiments/{experiment}").json()["decisions"][-1]
    assert "v3 in production now, and the control is v1" in last["reason"]


def test_a_winner_that_failed_its_gate_is_left_to_a_person(
    client: httpx.Client, wardrobe: Wardrobe, tmp_path: Path
) -> None:
    card = {"gate": {"passed": False, "failures": ["accuracy 0.41 is under 0.60."]}}
    source = make_adapter(tmp_path / "gated", seed=99, card=card)
    number = wardrobe.registry.push(source, NAME, actor="test").version.number
    experiment = start(client, on_win="promote", treatments=[f"@v{number}"])
    solve(client)
    wait_for(lambda: state(client, experiment) == "paused")
    last = client.get(f"/v1/experiments/{experiment}").json()["decisions"][-1]
    assert "better" in last["reason"]
    assert "did not pass its gate" in last["reason"]
    assert [event.number for event in wardrobe.registry.history(NAME)] == [1]


def test_arms_that_load_slowly_hold_no_other_experiment_up(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    wardrobe.push(OTHER)
    wardrobe.push(OTHER, promote=False)
    experiment = start(client)
    live.engine.load_seconds = 30.0
    path = f"/v1/adapters/{OTHER}/experiments"
    slow = client.post(path, json=DESIGN).json()["id"]
    act(client, slow, "start", exposure=1.0)
    time.sleep(2 * POLL_SECONDS)
    act(client, experiment, "stop")
    wait_for(lambda: "x-arm" not in ask(client, "u").headers, seconds=20)  # it loads for 30


def test_an_experiment_that_cannot_be_judged_keeps_no_other_from_it(
    client: httpx.Client, wardrobe: Wardrobe, monkeypatch: pytest.MonkeyPatch
) -> None:
    wardrobe.push(OTHER)
    wardrobe.push(OTHER, promote=False)
    made = client.post(f"/v1/adapters/{OTHER}/experiments", json=DESIGN).json()["id"]
    act(client, made, "start", exposure=1.0)
    experiment = start(client)

    def judge(judged: Experiment, counts: Sequence[Counts]) -> Verdict:
        if judged.id == made:
            raise ArithmeticError("sums that nobody foresaw")
        return Verdict("loss", "as the test says")

    monkeypatch.setattr(live_experiments, "decide", judge)
    wait_for(lambda: state(client, experiment) == "stopped")


def test_users_of_two_tenants_are_two_units(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    wardrobe.registry.share(NAME, "beta")
    experiment = start(client)
    headers = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    before = sum(client.get(f"/v1/experiments/{experiment}").json()["units"])
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as other:
        wait_for(lambda: ask(other, "17").status_code == 200)
    ask(client, "17")
    assert sum(client.get(f"/v1/experiments/{experiment}").json()["units"]) == before + 2


def test_a_treatment_of_another_tenant_tells_nothing_of_it(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    wardrobe.push(AdapterName("beta", "legal"))
    for name in ("beta/legal", "beta/nothing"):
        for version in ("", "@v1", "@v9", "@canary"):
            answer = client.post(PATH, json=DESIGN | {"treatments": [name + version]})
            said = answer.json()["error"]["message"]
            assert said == f"{name} belongs to another tenant than acme/support."


def test_a_treatment_may_leave_the_namespace_out(client: httpx.Client) -> None:
    made = client.post(PATH, json=DESIGN | {"treatments": ["support@v2"]})
    assert made.json()["arms"][1]["version"] == "acme/support@v2"


def test_an_arm_that_cannot_be_served_pauses_the_experiment(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    live.engine.not_finite.add(wardrobe.push(promote=False))
    made = client.post(PATH, json=DESIGN | {"treatments": ["@v3"]}).json()["id"]
    act(client, made, "start", exposure=1.0)
    wait_for(lambda: state(client, made) == "paused")
    assert ask(client, "u").headers["x-adapter"] == "acme/support@v1"
    last = client.get(f"/v1/experiments/{made}").json()["decisions"][-1]
    assert "self-check" in last["reason"]


def test_a_design_that_cannot_work_is_refused_with_the_reason(client: httpx.Client) -> None:
    for change, word in (
        ({"treatments": ["@v1"]}, "same version"),
        ({"treatments": ["@v9"]}, "v9"),
        ({"treatments": ["base"], "on_win": "promote"}, "promoted"),
        ({"metric": "solved:perhaps"}, "no metric"),
        ({"share": 1.5}, "share"),
        ({"share": 0.9999999999999999}, "share"),
        ({"alpha": 0.9}, "alpha"),
        ({"ramp": ["0.5", "0.2"]}, "higher exposure"),
        ({"ramp": ["0.02:soon"]}, "0.02:soon"),
        ({"ramp": ["nan"]}, "nan"),
        ({"ramp": ["0"]}, "exposure"),
        ({"signals": ["cost"]}, "prices"),
        ({"prices": [1, 2]}, "prices"),
        ({"least_effect": 0}, "least effect"),
        ({"max_units": 0}, "most units"),
        ({"metric": "comment:binary"}, "words"),
        ({"layer": "nowhere"}, "nowhere"),
        ({"layer": "main", "layer_share": 0}, "share of the layer"),
        ({"tretments": ["@v2"]}, "tretments"),
    ):
        answer = client.post(PATH, json=DESIGN | change)
        assert answer.status_code in (400, 404), change
        assert word in answer.json()["error"]["message"], change
    assert client.get("/v1/experiments").json()["data"] == []
