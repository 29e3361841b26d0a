import json

import pytest

from training.data.examples import ask
from training.evaluation.evaluate import Evaluation, Item, summed_up
from training.evaluation.metrics import Verdict
from training.evaluation.standings import stand
from training.evaluation.statistics import mcnemar


def evaluation(name: str, right: int, near: list[bool]) -> Evaluation:
    items = [
        Item(ask(str(n), "yes", str(n)), "yes", Verdict(float(n < right)), 7)
        for n in range(len(near))
    ]
    return summed_up(name, items, near)


def test_every_pair_is_tested_and_corrected_for_all_of_them() -> None:
    near = [n % 4 == 0 for n in range(20)]
    found = stand("label", [evaluation(n, r, near) for n, r in (("a", 2), ("b", 12), ("c", 13))])
    pairs = {(pair.first, pair.second): pair for pair in found.pairs}
    assert set(pairs) == {("a", "b"), ("a", "c"), ("b", "c")}, "the better one is second"
    assert pairs["a", "c"].difference.value == pytest.approx(11 / 20)
    assert pairs["a", "c"].p_holm == pytest.approx(3 * mcnemar(11, 0))
    assert pairs["a", "b"].p_holm == pytest.approx(2 * mcnemar(10, 0))
    assert pairs["b", "c"].p_holm == 1.0
    facts = json.loads(json.dumps(found.facts()))
    assert facts["versions"]["b"]["correct"] == 12
    assert facts["versions"]["b"]["prompt_tokens"] == 7.0
    assert facts["pairs"][0]["test"] == "exact McNemar"


def test_near_duplicates_are_scored_apart() -> None:
    near = [True, True, False, False, False]
    parts = evaluation("a", 3, near).parts
    assert (parts["near_duplicate"].correct, parts["near_duplicate"].total) == (2, 2)
    assert (parts["clean"].correct, parts["clean"].total) == (1, 3)
    assert evaluation("a", 3, [False] * 5).parts.keys() == {"clean"}
    assert summed_up("a", evaluation("a", 1, near).items, ()).parts == {}
