"""What the numbers of an experiment lead to."""

from dataclasses import replace

import pytest

from serving.experiments.answers import Exposure, Outcome
from serving.experiments.decide import decide
from serving.experiments.experiment import Experiment, Policy
from serving.experiments.moves import move
from serving.experiments.store import Experiments
from tests.serving.experiments.stored import feed, started


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
