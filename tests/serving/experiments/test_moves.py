"""What may be done with an experiment in which state, by people and by its ramp."""

from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from registry.errors import Conflict
from serving.experiments.design import DesignInvalid, make_metrics
from serving.experiments.experiment import Policy, Step
from serving.experiments.moves import move
from serving.experiments.ramps import next_step, read_ramp
from serving.experiments.store import Experiments
from tests.serving.experiments.stored import ARMS, NAME, created, started


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
