"""What a running server does about its experiments by itself: ramps, ends, promotes, pauses."""

import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from serving.experiments import live as live_experiments
from serving.experiments.answers import Counts
from serving.experiments.decide import Verdict
from serving.experiments.experiment import Experiment
from serving.experiments.live import POLL_SECONDS
from serving.tokens import Tokens
from tests.registry.making import make_adapter
from tests.serving.experiments.trial import DESIGN, OTHER, PATH, act, ask, solve, start, state
from tests.serving.live import NAME, Running, Wardrobe, eventually, running
from tests.serving.scripted import ScriptedEngine


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
            eventually(lambda: state(client, experiment) == "stopped")
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
    """Who is in which part is drawn anew: less than 3 of 100 in the first fifth is never seen."""
    made = client.post(PATH, json=DESIGN | {"ramp": ["0.2:0s:3", "0.5:0s:12", "1"]}).json()["id"]
    assert act(client, made, "start")["exposure"] == 0.2
    seen: dict[str, set[str]] = {}

    def everybody_took_part() -> bool:
        for unit in map(str, range(100)):
            headers = ask(client, unit).headers
            if "x-arm" in headers:
                seen.setdefault(unit, set()).add(headers["x-arm"])
        return len(seen) == 100

    eventually(everybody_took_part)
    assert all(len(arms) == 1 for arms in seen.values())
    log = client.get(f"/v1/experiments/{made}").json()["decisions"]
    moves = [d for d in log if d["action"] == "ramp"]
    assert [d["actor"] for d in moves] == ["wardrobe", "wardrobe"]
    assert sum(moves[0]["numbers"]["units"]) >= 3
    assert "0.5:0s:12" in moves[0]["reason"]


def test_a_winner_is_promoted_where_the_design_says_so(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    experiment = start(client, on_win="promote")
    solve(client)
    eventually(lambda: state(client, experiment) == "stopped")
    eventually(lambda: ask(client, "anybody").headers["x-adapter"] == "acme/support@v2")
    last = wardrobe.registry.history(NAME)[-1]
    assert (last.number, last.actor) == (2, "wardrobe")
    assert experiment in last.reason


def test_a_winner_that_failed_its_gate_is_left_to_a_person(
    client: httpx.Client, wardrobe: Wardrobe, tmp_path: Path
) -> None:
    card = {"gate": {"passed": False, "failures": ["accuracy 0.41 is under 0.60."]}}
    source = make_adapter(tmp_path / "gated", seed=99, card=card)
    number = wardrobe.registry.push(source, NAME, actor="test").version.number
    experiment = start(client, on_win="promote", treatments=[f"@v{number}"])
    solve(client)
    eventually(lambda: state(client, experiment) == "paused")
    last = client.get(f"/v1/experiments/{experiment}").json()["decisions"][-1]
    assert "better" in last["reason"]
    assert "did not pass its gate" in last["reason"]
    assert [event.number for event in wardrobe.registry.history(NAME)] == [1]


def test_production_that_is_moved_goes_before_the_experiment(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    """Whoever rolls back what is broken must not find it served on as a control."""
    experiment = start(client)
    wardrobe.push()
    eventually(lambda: ask(client, "u").headers["x-adapter"] == "acme/support@v3")
    answers = [ask(client, f"user {number}") for number in range(20)]
    assert {a.headers["x-adapter"] for a in answers} == {"acme/support@v3"}
    assert {a.headers.get("x-arm") for a in answers} == {None}
    eventually(lambda: state(client, experiment) == "paused")
    last = client.get(f"/v1/experiments/{experiment}").json()["decisions"][-1]
    assert "v3 in production now, and the control is v1" in last["reason"]


def test_an_arm_that_cannot_be_served_pauses_the_experiment(
    client: httpx.Client, live: Running, wardrobe: Wardrobe
) -> None:
    live.engine.not_finite.add(wardrobe.push(promote=False))
    made = client.post(PATH, json=DESIGN | {"treatments": ["@v3"]}).json()["id"]
    act(client, made, "start", exposure=1.0)
    eventually(lambda: state(client, made) == "paused")
    assert ask(client, "u").headers["x-adapter"] == "acme/support@v1"
    last = client.get(f"/v1/experiments/{made}").json()["decisions"][-1]
    assert "self-check" in last["reason"]


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
    eventually(lambda: "x-arm" not in ask(client, "u").headers, seconds=20)  # it loads for 30


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
    eventually(lambda: state(client, experiment) == "stopped")
