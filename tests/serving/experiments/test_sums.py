"""What is said of answers and what it adds up to: nothing is lost or counted twice."""

import json
import math
from pathlib import Path

import pytest

from registry.errors import NotFound
from serving.experiments.answers import Exposure, Outcome
from serving.experiments.design import make_metrics
from serving.experiments.experiment import Policy
from serving.experiments.feedback import FeedbackInvalid
from serving.experiments.looks import from_feedback
from serving.experiments.store import Experiments
from tests.serving.experiments.stored import ARMS, NAME, expose, feed, started


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


def test_rows_written_twice_count_once(store: Experiments) -> None:
    experiment = started(store)
    for _ in range(2):
        expose(store, experiment, 0, "u", answers=2)
    counts = store.counts(experiment)[0]
    assert (counts.units, counts.answers, counts.metrics["errors"].x) == (1, 2, 2)


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
