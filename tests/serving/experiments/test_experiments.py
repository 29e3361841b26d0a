"""Who gets which arm, what the numbers lead to, and that nothing is lost or counted twice."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from registry.adapter import AdapterName
from registry.errors import Conflict, NotFound
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.decide import decide
from serving.experiments.design import DesignInvalid, make_metrics
from serving.experiments.experiment import Arm, Experiment, Policy, Step, unit_of
from serving.experiments.feedback import FeedbackInvalid
from serving.experiments.looks import from_feedback
from serving.experiments.moves import move
from serving.experiments.power import estimate
from serving.experiments.ramps import next_step, read_ramp
from serving.experiments.sequential import Sums, compare
from serving.experiments.store import Experiments

NAME = AdapterName("acme", "support")
ARMS = (Arm("control", 0.5, NAME, 1, "a" * 64), Arm("treatment", 0.5, NAME, 2, "b" * 64))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Experiments]:
    with Experiments(tmp_path) as store:
        yield store


def created(store: Experiments, arms: tuple[Arm, ...] = ARMS, **changes: object) -> Experiment:
    metrics = make_metrics("solved:binary", ["errors", "angry:binary:lower"], ["stars:average"])
    policy = Policy(**changes)  # type: ignore[arg-type]  # as the tests give them
    return store.create(NAME, arms, metrics, policy, actor="test")


def started(store: Experiments, exposure: float = 1.0, **changes: object) -> Experiment:
    experiment = created(store, **changes)  # type: ignore[arg-type]  # passed on
    return move(store, experiment, "start", exposure=exposure, actor="test", reason="go")


def expose(
    store: Experiments, experiment: Experiment, arm: int, unit: str, answers: int = 1
) -> list[str]:
    ids = [f"req_{experiment.id}_{arm}_{unit}_{number}" for number in range(answers)]
    rows = [Exposure(i, experiment.id, arm, unit, "acme", True) for i in ids]
    store.record(rows, [Outcome(i, False, 1.0, 10) for i in ids])
    return ids


def feed(
    store: Experiments, request_id: str, metric: str, value: float, key: str | None = None
) -> bool:
    return store.give_feedback(request_id, metric, value, tenant="acme", key=key)


# Assignment


def units(count: int) -> list[str]:
    return [unit_of("salt", f"user {number}") for number in range(count)]


def test_the_same_unit_always_gets_the_same_arm(store: Experiments) -> None:
    experiment = started(store)
    again = store.get(experiment.id)
    assert [experiment.assign(u) for u in units(500)] == [again.assign(u) for u in units(500)]


def test_a_ramp_moves_nobody_to_another_arm(store: Experiments) -> None:
    experiment = started(store)
    before: dict[str, int] = {}
    for exposure in (0.02, 0.2, 0.5, 1.0):
        now = replace(experiment, exposure=exposure)
        arms = {u: arm for u in units(5000) if (arm := now.assign(u)) is not None}
        assert before.items() <= arms.items(), "who was in stays in, with the same arm"
        assert len(arms) == pytest.approx(5000 * exposure, abs=4 * math.sqrt(5000 / 4))
        before = arms


def test_shares_are_kept_and_do_not_depend_on_the_exposure(store: Experiments) -> None:
    arms = tuple(replace(arm, share=s) for arm, s in zip(ARMS, (0.8, 0.2), strict=True))
    experiment = started(store, exposure=0.3, arms=arms)
    got = Counter(arm for u in units(20_000) if (arm := experiment.assign(u)) is not None)
    total = sum(got.values())
    assert got[1] / total == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / total))


def test_two_experiments_split_independently(store: Experiments) -> None:
    one = started(store)
    two = replace(one, salt="another")
    pairs = Counter((one.assign(u), two.assign(u)) for u in units(8000))
    assert all(abs(count - 2000) < 4 * math.sqrt(8000 * 3 / 16) for count in pairs.values())


# Life cycle


def test_an_experiment_goes_only_where_its_state_allows(store: Experiments) -> None:
    draft = created(store)
    for action in ("pause", "ramp"):
        with pytest.raises(Conflict, match="is draft"):
            move(store, draft, action, exposure=0.5, actor="t", reason="x")
    with pytest.raises(DesignInvalid, match="needs an exposure"):
        move(store, draft, "start", exposure=None, actor="t", reason="x")
    running = move(store, draft, "start", exposure=0.2, actor="t", reason="x")
    with pytest.raises(DesignInvalid, match="can only grow"):
        move(store, running, "ramp", exposure=0.1, actor="t", reason="x")
    paused = move(store, running, "pause", exposure=None, actor="t", reason="look")
    with pytest.raises(Conflict, match="is paused"):
        move(store, paused, "ramp", exposure=1, actor="script", reason="every morning")
    again = move(store, paused, "start", exposure=None, actor="t", reason="go on")
    assert (again.state, again.exposure) == ("running", 0.2)
    ended = move(store, again, "stop", exposure=None, actor="t", reason="done")
    with pytest.raises(Conflict, match="is stopped"):
        move(store, ended, "start", exposure=1, actor="t", reason="x")
    log = [decision.action for decision in store.decisions(draft.id)]
    assert log == ["create", "start", "pause", "start", "stop"]


def test_of_two_that_decide_at_once_one_is_refused(store: Experiments) -> None:
    experiment = started(store)
    move(store, experiment, "pause", exposure=None, actor="one", reason="x")
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.move(experiment, "stopped", action="stop", actor="two", reason="x")


def test_what_is_done_with_a_move_happens_with_it_or_not_at_all(store: Experiments) -> None:
    experiment = started(store)
    done: list[str] = []

    def refuse() -> None:
        raise Conflict("the gate")

    with pytest.raises(Conflict, match="the gate"):
        store.move(experiment, "stopped", action="win", actor="t", reason="x", also=refuse)
    assert store.get(experiment.id) == experiment
    stopped = move(store, experiment, "stop", exposure=None, actor="person", reason="x")
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.move(
            experiment, "stopped", action="win", actor="t", reason="x", also=lambda: done.append("")
        )
    assert (done, store.get(experiment.id)) == ([], stopped), "a stop is not overtaken"


def test_one_adapter_has_one_experiment_at_a_time(store: Experiments) -> None:
    first = started(store)
    second = created(store)
    with pytest.raises(Conflict, match=first.id):
        move(store, second, "start", exposure=1, actor="t", reason="x")


def test_a_tenant_has_so_many_experiments_and_no_more(
    store: Experiments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.experiments.store.MAX_OPEN", 2)
    first, second = created(store), created(store)
    with pytest.raises(Conflict, match="Stop some"):
        created(store)
    move(store, first, "stop", exposure=None, actor="t", reason="x")
    third = created(store)
    assert [e.id for e in store.find(["draft"], "acme")] == [second.id, third.id]
    assert store.find(namespace="beta") == []


# Feedback and sums


def test_feedback_counts_once_a_unit_and_the_last_value_wins(store: Experiments) -> None:
    experiment = started(store)
    ids = expose(store, experiment, 1, "u1", answers=3)
    expose(store, experiment, 1, "u2")
    assert feed(store, ids[0], "solved", 1)
    assert feed(store, ids[1], "solved", 1)
    assert store.counts(experiment)[1].metrics["solved"].y == 1, "u1 once, u2 not"
    assert feed(store, ids[0], "solved", 0)
    assert feed(store, ids[1], "solved", 0)
    counts = store.counts(experiment)[1]
    assert (counts.units, counts.answers, counts.metrics["solved"].y) == (2, 4, 0)


def test_a_repeated_key_changes_nothing(store: Experiments) -> None:
    experiment = started(store)
    (request_id,) = expose(store, experiment, 0, "u")
    assert feed(store, request_id, "stars", 5, key="k1")
    assert feed(store, request_id, "stars", 1, key="k2")
    assert not feed(store, request_id, "stars", 5, key="k1")
    assert store.counts(experiment)[0].metrics["stars"].value == 1


def test_an_average_is_over_answers_that_were_judged(store: Experiments) -> None:
    experiment = started(store)
    ids = expose(store, experiment, 0, "u", answers=4) + expose(store, experiment, 0, "v")
    for request_id, stars in zip(ids, (1, 2, 3), strict=False):
        feed(store, request_id, "stars", stars)
    stars = store.counts(experiment)[0].metrics["stars"]
    assert (stars.n, stars.value) == (1, 2), "v was not judged and is no unit of it"


def test_an_idempotency_key_is_of_one_metric(store: Experiments) -> None:
    experiment = started(store)
    (request_id,) = expose(store, experiment, 0, "u")
    assert feed(store, request_id, "solved", 1, key="order-4711")
    assert feed(store, request_id, "stars", 5, key="order-4711")
    assert store.counts(experiment)[0].metrics["stars"].y == 5


def test_a_metric_may_be_called_as_its_kind(store: Experiments) -> None:
    metrics = make_metrics("binary:binary", ["errors"], [])
    experiment = store.create(NAME, ARMS, metrics, Policy(), actor="test")
    (request_id,) = expose(store, experiment, 0, "u")
    assert feed(store, request_id, "binary", 1)


def test_times_and_tokens_are_means_over_the_answers_of_a_unit(store: Experiments) -> None:
    metrics = make_metrics("latency", ["errors"], ["tokens"])
    experiment = store.create(NAME, ARMS, metrics, Policy(), actor="test")
    ids = expose(store, experiment, 0, "u", answers=2)
    rows = [Exposure(f"{i}x", experiment.id, 0, "v", "acme", True) for i in ids]
    store.record(rows, [Outcome(f"{ids[0]}x", False, math.e**3, 40)])
    found = store.counts(experiment)[0].metrics
    assert (found["latency"].n, found["latency"].x, found["tokens"].value) == (2, 3, 20)
    assert found["latency"].value == pytest.approx(1.0), "ln 1, ln 1 and ln e³; one has not ended"


def test_feedback_that_cannot_be_is_refused(store: Experiments) -> None:
    experiment = started(store)
    (request_id,) = expose(store, experiment, 0, "u")
    with pytest.raises(NotFound, match="takes no feedback 'mood'"):
        feed(store, request_id, "mood", 1)
    with pytest.raises(NotFound, match="takes no feedback 'errors'"):
        feed(store, request_id, "errors", 1)
    with pytest.raises(FeedbackInvalid, match="0 or 1"):
        feed(store, request_id, "solved", 0.5)
    with pytest.raises(NotFound):
        feed(store, "req_unknown", "solved", 1)
    with pytest.raises(NotFound) as other:
        store.give_feedback(request_id, "solved", 1, tenant="beta", key=None)
    assert "No experiment knows" in other.value.message


def test_demonstrations_become_rows_of_a_recipe_grouped_by_who_asked(
    store: Experiments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.experiments.feedback.PAGE", 2)
    experiment = started(store)
    ids = expose(store, experiment, 1, "u", answers=2) + expose(store, experiment, 0, "v")
    asked = [{"role": "user", "content": "lights on"}]
    for number, request_id in enumerate(ids):
        give = (request_id, "demonstration", f"answer {number}", asked)
        assert store.give_words(*give, tenant="acme", key="k")
        assert not store.give_words(*give, tenant="acme", key="k")
    out = tmp_path / "rows.jsonl"
    from_feedback(str(NAME), out, home=tmp_path)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == ["answer 0", "answer 1", "answer 2"]
    assert [row["group"] for row in rows] == ["u", "u", "v"]
    assert [row["made"]["instead_of"] for row in rows] == [f"{NAME}@v2"] * 2 + [f"{NAME}@v1"]


def test_an_answer_takes_so_many_words_and_no_more(
    store: Experiments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.experiments.feedback.MAX_REMARKS", 2)
    (request_id,) = expose(store, started(store), 0, "u")
    for _ in range(2):
        assert store.give_words(request_id, "comment", "too long", (), tenant="acme", key=None)
    with pytest.raises(FeedbackInvalid, match="the most"):
        store.give_words(request_id, "comment", "too long", (), tenant="acme", key=None)


def test_rows_written_twice_count_once(store: Experiments) -> None:
    experiment = started(store)
    for _ in range(2):
        expose(store, experiment, 0, "u", answers=2)
    counts = store.counts(experiment)[0]
    assert (counts.units, counts.answers, counts.metrics["errors"].x) == (1, 2, 2)


# Decisions


def fill(store: Experiments, experiment: Experiment, arm: int, n: int, **good: int) -> None:
    """Give an arm n units, of which so many have a 1 in each named metric."""
    prefix = f"{arm}-{n}"
    ids = [f"req_{experiment.id}_{prefix}_{i}" for i in range(n)]
    rows = [Exposure(r, experiment.id, arm, r[-32:], "acme", True) for r in ids]
    store.record(rows, [Outcome(i, False, 1.0, 10) for i in ids])
    for metric, count in good.items():
        for request_id in ids[:count]:
            feed(store, request_id, metric, 1)


def test_few_units_are_no_verdict(store: Experiments) -> None:
    experiment = started(store)
    fill(store, experiment, 0, 20, solved=2)
    fill(store, experiment, 1, 20, solved=18)
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, verdict.winner) == ("go on", None)
    assert "Collecting" in verdict.sentence


def test_a_better_arm_wins_and_the_numbers_say_by_how_much(store: Experiments) -> None:
    experiment = started(store)
    fill(store, experiment, 0, 200, solved=70)
    fill(store, experiment, 1, 200, solved=130)
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, verdict.winner) == ("win", 1)
    assert verdict.readings[0].difference.low > 0
    assert "0.65" in verdict.sentence
    assert "0.35" in verdict.sentence


def test_a_worse_arm_is_a_loss_and_equal_arms_are_not_told_apart(store: Experiments) -> None:
    worse = started(store)
    fill(store, worse, 0, 200, solved=130)
    fill(store, worse, 1, 200, solved=70)
    assert decide(worse, store.counts(worse)).action == "loss"
    move(store, worse, "stop", exposure=None, actor="t", reason="x")
    equal = started(store)
    fill(store, equal, 0, 200, solved=100)
    fill(store, equal, 1, 200, solved=103)
    verdict = decide(equal, store.counts(equal))
    assert (verdict.action, "not told apart" in verdict.sentence) == ("go on", True)
    needed = verdict.readings[0].units_needed
    assert needed is not None
    assert needed > 10_000, "1.5 points at 50 % are a small difference"
    assert str(needed) in verdict.sentence


def test_a_harmed_guardrail_ends_it_even_when_the_primary_metric_is_better(
    store: Experiments,
) -> None:
    experiment = started(store)
    fill(store, experiment, 0, 150, solved=50, angry=3)
    fill(store, experiment, 1, 150, solved=120, angry=60)
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, verdict.winner) == ("stop harmed", None)
    assert "angry" in verdict.sentence


def test_a_broken_arm_is_seen_before_the_t_form_may_speak(store: Experiments) -> None:
    experiment = started(store)
    fill(store, experiment, 0, 40, angry=1)
    fill(store, experiment, 1, 40, angry=30)
    assert decide(experiment, store.counts(experiment)).action == "stop harmed"


@pytest.mark.parametrize("failing", [30, 100])
def test_an_arm_that_fails_beside_a_control_that_never_does_is_stopped(
    store: Experiments, failing: int
) -> None:
    """The usual control has no error at all, and so no variation."""
    experiment = started(store)
    fill(store, experiment, 0, 100)
    ids = [f"req_bad_{i}" for i in range(100)]
    rows = [Exposure(i, experiment.id, 1, i, "acme", True) for i in ids]
    store.record(rows, [Outcome(r, i < failing, 1.0, 10) for i, r in enumerate(ids)])
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, "errors" in verdict.sentence) == ("stop harmed", True)


def test_a_few_ratings_among_many_units_are_no_verdict(store: Experiments) -> None:
    experiment = started(store)
    for arm, stars in ((0, (5, 5, 5)), (1, (1, 1, 2))):
        fill(store, experiment, arm, 200)
        for number, value in enumerate(stars):
            feed(store, f"req_{experiment.id}_{arm}-200_{number}", "stars", value)
    verdict = decide(experiment, store.counts(experiment))
    stars = next(reading for reading in verdict.readings if reading.metric == "stars")
    assert stars.difference.collecting


def test_a_split_that_is_not_what_was_meant_pauses_everything(store: Experiments) -> None:
    experiment = started(store)
    fill(store, experiment, 0, 240, solved=10)
    fill(store, experiment, 1, 100, solved=90)
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, verdict.mismatch) == ("pause", True)
    assert "240 : 100" in verdict.sentence


def test_a_test_that_cannot_pay_is_ended(store: Experiments) -> None:
    experiment = started(store, least_effect=0.2)
    fill(store, experiment, 0, 300, solved=150)
    fill(store, experiment, 1, 300, solved=151)
    verdict = decide(experiment, store.counts(experiment))
    assert (verdict.action, "better by 0.2" in verdict.sentence) == ("futile", True)
    small = replace(experiment, policy=Policy(least_effect=0.005))
    assert decide(small, store.counts(experiment)).action == "go on"
    ended = replace(experiment, policy=Policy(max_units=600))
    verdict = decide(ended, store.counts(experiment))
    assert (verdict.action, "600 units, the most" in verdict.sentence) == ("futile", True)
    longer = replace(experiment, policy=Policy(max_units=601))
    assert decide(longer, store.counts(experiment)).action == "go on"


# Ramps


def test_a_ramp_is_held_for_its_time_and_its_units(store: Experiments) -> None:
    experiment = started(store, exposure=0.02, ramp=read_ramp(["0.02:1h:500", "0.2:30m", "1"]))
    assert experiment.held_since is not None
    since = datetime.fromisoformat(experiment.held_since)
    soon, later = since + timedelta(minutes=59), since + timedelta(minutes=60)
    assert next_step(experiment, 10_000, soon) is None
    assert next_step(experiment, 499, later) is None
    assert next_step(experiment, 500, later) == Step(0.2, 1800.0, 0)
    for state in ("paused", "stopped"):
        assert next_step(replace(experiment, state=state), 500, later) is None
    assert next_step(replace(experiment, exposure=1.0), 500, later) is None


def test_a_person_may_go_ahead_of_a_ramp(store: Experiments) -> None:
    experiment = started(store, exposure=0.02, ramp=read_ramp(["0.02:1h", "0.2:1h", "1"]))
    between = move(store, experiment, "ramp", exposure=0.5, actor="ann", reason="it looks well")
    assert between.held_since is not None
    later = datetime.fromisoformat(between.held_since) + timedelta(hours=1)
    assert next_step(between, 0, later) == Step(1.0)


def test_a_pause_begins_the_hold_again(store: Experiments) -> None:
    experiment = started(store, exposure=0.02, ramp=read_ramp(["0.02:1h", "1"]))
    paused = move(store, experiment, "pause", exposure=None, actor="ann", reason="a look")
    again = move(store, paused, "start", exposure=None, actor="ann", reason="go on")
    assert paused.held_since == experiment.held_since
    assert again.held_since is not None
    assert again.held_since >= (experiment.held_since or "")


# Power


def test_a_test_of_the_estimated_size_finds_the_effect_four_times_of_five(
    store: Experiments,
) -> None:
    experiment = created(store)
    needed = estimate(experiment, units_per_day=100, effect=0.1, baseline=0.3)
    assert needed.days == pytest.approx(needed.units / 100)
    rng = np.random.default_rng(5)
    half, found, runs = needed.units // 2, 0, 2000
    for a, b in zip(rng.binomial(half, 0.3, runs), rng.binomial(half, 0.4, runs), strict=True):
        first, second = Sums.of_means(half, a, a), Sums.of_means(half, b, b)
        found += compare(first, second, experiment.policy.alpha).low > 0
    assert 0.78 <= found / runs <= 0.84, "at this one look; those before it add to it"


@pytest.mark.parametrize(
    "given",
    [
        {"effect": 0.0, "baseline": 0.3},  # is not "not given"
        {"baseline": 0.3, "deviation": 2.0},
        {"deviation": 0.5},
        {"baseline": 0.3, "units_per_day": 0.0},
        {},
    ],
)
def test_numbers_that_would_be_left_out_of_an_estimate_are_refused(
    store: Experiments, given: dict[str, float]
) -> None:
    experiment = created(store, least_effect=0.1)
    assert estimate(experiment, units_per_day=100, baseline=0.3).effect == 0.1
    with pytest.raises(DesignInvalid):
        estimate(experiment, **({"units_per_day": 100.0} | given))


def test_an_experiment_with_a_ramp_and_a_slice_takes_longer(store: Experiments) -> None:
    store.add_layer("acme", "main", 0.0)
    metrics = make_metrics("solved:binary", ["errors"], [])
    policy = Policy(ramp=read_ramp(["0.1:2d", "1"]), least_effect=0.1)
    experiment = store.create(NAME, ARMS, metrics, policy, layer=("main", 0.5), actor="test")
    found = estimate(experiment, units_per_day=200, baseline=0.3)
    assert found.days == pytest.approx(2 + (found.units - 20) / 100)


# Layers


def test_slices_of_a_layer_fit_beside_each_other_and_into_what_was_left(
    store: Experiments,
) -> None:
    store.add_layer("acme", "main", 0.1)
    metrics = make_metrics("solved:binary", ["errors"], [])

    def make(share: float) -> Experiment:
        return store.create(NAME, ARMS, metrics, Policy(), layer=("main", share), actor="test")

    made = [make(0.3), make(0.3), make(0.3)]
    keys = [f"acme\x1fuser {number}" for number in range(3000)]
    places = Counter(tuple(experiment.may_have(key) for experiment in made) for key in keys)
    assert set(places) == {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)}
    assert places[False, False, False] == pytest.approx(300, abs=4 * math.sqrt(3000 * 0.09))
    with pytest.raises(Conflict, match="free part"):
        make(0.01)
    move(store, made[1], "stop", exposure=None, actor="t", reason="x")
    assert store.layer("acme", "main").free == [(0.3, 0.6)]
    again = make(0.2)
    assert again.slice is not None
    assert (again.slice.low, again.slice.high) == (0.3, 0.5)
    with pytest.raises(NotFound, match="layer create"):
        store.create(NAME, ARMS, metrics, Policy(), layer=("other", 0.1), actor="test")
    with pytest.raises(Conflict, match="never changes"):
        store.add_layer("acme", "main", 0.5)


def test_only_experiments_of_one_layer_run_on_an_adapter_at_once(store: Experiments) -> None:
    store.add_layer("acme", "main", 0.0)
    metrics = make_metrics("solved:binary", ["errors"], [])
    one, two = (
        store.create(NAME, ARMS, metrics, Policy(), layer=("main", 0.5), actor="t")
        for _ in range(2)
    )
    for experiment in (one, two):
        move(store, experiment, "start", exposure=1, actor="t", reason="x")
    with pytest.raises(Conflict, match="in one layer"):
        move(store, created(store), "start", exposure=1, actor="t", reason="x")


@pytest.mark.parametrize(
    "text", ["solved", "solved:maybe", "errors:binary", "a b:binary", ":binary", "x:binary:worse"]
)
def test_a_metric_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(DesignInvalid):
        make_metrics(text, [], [])
