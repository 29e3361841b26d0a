"""Who gets which arm, and which slice of a layer."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from registry.errors import Conflict, NotFound
from serving.experiments.design import DesignInvalid, make_metrics
from serving.experiments.experiment import Experiment, Policy, unit_of
from serving.experiments.moves import move
from serving.experiments.store import Experiments
from tests.serving.experiments.stored import ARMS, NAME, started


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


@pytest.mark.parametrize("reason", ["", "  ", "x" * 2001])
def test_no_experiment_is_moved_without_a_reason(store: Experiments, reason: str) -> None:
    made = store.create(NAME, ARMS, make_metrics("errors", [], []), Policy(), actor="test")
    with pytest.raises(DesignInvalid, match="needs a reason"):
        move(store, made, "start", exposure=0.5, actor="test", reason=reason)
    assert store.get(made.id).state == "draft"


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
    with pytest.raises(NotFound, match="no layer acme/other") as refused:
        store.create(NAME, ARMS, metrics, Policy(), layer=("other", 0.1), actor="test")
    assert "layer create acme/other" in refused.value.command
    with pytest.raises(Conflict, match="never changes"):
        store.add_layer("acme", "main", 0.5)
