"""Experiments on a running server: who gets which arm, and what is counted of the answers."""

import sqlite3
from contextlib import closing

import httpx
import pytest

from serving.experiments import recorder
from serving.experiments.store import Experiments
from serving.tenants.keys import SCOPES, add_key
from tests.serving.experiments.trial import DESIGN, PATH, act, ask, start
from tests.serving.live import NAME, Running, Wardrobe, eventually
from tests.serving.scripted import says
from tests.serving.test_prompt_versions import push_prompt


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


def test_users_of_two_tenants_are_two_units(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    wardrobe.registry.share(NAME, "beta")
    experiment = start(client)
    headers = {"authorization": f"Bearer {add_key(wardrobe.registry, 'beta', SCOPES)}"}
    before = sum(client.get(f"/v1/experiments/{experiment}").json()["units"])
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as other:
        eventually(lambda: ask(other, "17").status_code == 200)
    ask(client, "17")
    assert sum(client.get(f"/v1/experiments/{experiment}").json()["units"]) == before + 2


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

    eventually(both)
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

        eventually(ended)
        assert sum(c.metrics["errors"].y for c in store.counts(found)) == 1


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

        eventually(lambda: sum(c.unended for c in store.coverage(found)) == 0)
        malformed, ended = answers("malformed")
        assert (malformed, ended > 2) == (2, True)
        assert answers("cost")[0] > 3 * ended, "prompt tokens once, and generated tokens twice"


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
    eventually(lambda: "x-arm" in ask(client, "user 1").headers)
    metrics = httpx.get(f"{live.url}/metrics", headers=live.headers).text
    assert 'wardrobe_exposures_total{written="no"}' in metrics


def test_a_database_that_refuses_rows_costs_no_answer(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    start(client)
    with closing(sqlite3.connect(wardrobe.registry.home / "experiments.sqlite")) as database:
        refuse = "BEFORE INSERT ON exposures BEGIN SELECT RAISE(ABORT, 'damaged'); END"
        database.execute(f"CREATE TRIGGER refuse {refuse}")
    answer = ask(client, "user 1")
    assert (answer.status_code, answer.headers["x-adapter"]) == (200, "acme/support@v1")
    assert "x-arm" not in answer.headers, "production, and not counted"
