import numpy as np
import pytest

from tests.training.comparison.making import drawn_rows, row
from training.comparison.result import Cost, Forgetting, Row, Verdict
from training.comparison.significance import compare_pair, compare_rows, interval
from training.comparison.verdict import decide
from training.evaluation.statistics import wilson


def verdict_on(rows: list[Row], untouched: Forgetting | None = None) -> Verdict:
    groups = range(len(rows[0].runs[0].values))
    return decide(rows, compare_rows(rows, groups), groups, untouched)


def named_rate(shares: list[float], rounds: int, **setting) -> float:
    """How often a winner is named, over rounds of drawn tables."""
    generator = np.random.default_rng(1)
    winners = 0
    for _ in range(rounds):
        rows = drawn_rows(generator, shares, **setting)
        winners += verdict_on(rows).winner is not None
    return winners / rounds


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.3)])
def test_equal_rows_have_a_winner_no_more_often_than_the_level(
    rows: int, seeds: int, spread: float
) -> None:
    rate = named_rate([0.5] * rows, 300, items=60, seeds=seeds, seed_spread=spread)
    assert rate <= 0.05 + 2.6 * (0.05 * 0.95 / 300) ** 0.5


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_planted_better_row_is_found(seeds: int) -> None:
    rate = named_rate([0.4, 0.4, 0.8], 100, items=100, seeds=seeds, seed_spread=0.1 * (seeds > 1))
    assert rate > 0.9


def test_equal_rows_are_hardly_ever_told_apart_at_all() -> None:
    """The correction is over all pairs: the best was picked by the same items."""
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        rows = drawn_rows(generator, [0.5] * 6, items=60)
        wrong += min(pair.p_holm for pair in compare_rows(rows, range(60))) < 0.05
    assert wrong / 300 <= 0.05 + 2.6 * (0.05 * 0.95 / 300) ** 0.5


def test_without_the_correction_equal_rows_would_be_told_apart() -> None:
    """The negative control of the test above."""
    generator = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        rows = drawn_rows(generator, [0.5] * 6, items=60)
        wrong += min(pair.p for pair in compare_rows(rows, range(60))) < 0.05
    assert wrong / 300 > 0.15


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.3)])
def test_the_interval_of_a_row_holds_the_truth_as_often_as_it_says(
    seeds: int, spread: float
) -> None:
    generator = np.random.default_rng(3)
    truth = np.mean([r.value for r in drawn_rows(generator, [0.7], items=100_000, seeds=40)])
    held = 0
    for _ in range(400):
        (one,) = drawn_rows(generator, [0.7], items=60, seeds=seeds, seed_spread=spread)
        found = interval(one.runs, range(60))
        held += found.low <= truth <= found.high
    assert held / 400 >= 0.95 - 2.6 * (0.05 * 0.95 / 400) ** 0.5


def test_ignoring_the_seeds_would_be_too_sure() -> None:
    """The negative control: one interval over all answers as if each seed gave new items."""
    generator = np.random.default_rng(3)
    truth = np.mean([r.value for r in drawn_rows(generator, [0.7], items=100_000, seeds=40)])
    held = 0
    for _ in range(400):
        (one,) = drawn_rows(generator, [0.7], items=60, seeds=3, seed_spread=0.3)
        right = sum(sum(run.values) for run in one.runs)
        found = wilson(int(right), 180)
        held += found.low <= truth <= found.high
    assert held / 400 < 0.93


def test_one_run_of_right_and_wrong_has_wilsons_interval_and_mcnemars_test() -> None:
    a = row("a", [[1] * 27 + [0] * 2 + [0] * 31])
    b = row("b", [[0] * 27 + [1] * 2 + [0] * 31])
    assert interval(a.runs, range(60)).low == pytest.approx(wilson(27, 60).low)
    pair = compare_pair(a, b, range(60))
    assert (pair.wins, pair.losses) == (27, 2)
    assert pair.p == pytest.approx(2 * sum((1, 29, 406)) / 2**29)
    assert pair.low < 25 / 60 < pair.high


def test_the_items_needed_are_those_of_the_textbook() -> None:
    """Discordant 20 % and 10 %: about 234 pairs by the formula without continuity correction."""
    a = row("a", [[1] * 20 + [0] * 10 + [0] * 70])
    b = row("b", [[0] * 20 + [1] * 10 + [0] * 70])
    assert compare_pair(a, b, range(100)).items_needed == pytest.approx(230, abs=8)


def test_rows_that_answer_alike_are_not_told_apart() -> None:
    rows = [row("base", [[0, 1] * 10], "prompt"), row("a", [[0, 1] * 10])]
    verdict = verdict_on(rows)
    assert verdict.winner is None
    assert verdict.ship is None
    assert "Nothing here beats the base prompt" in verdict.headline


def general(accuracy: float) -> Forgetting:
    return Forgetting(
        perplexity=20.0, qa_accuracy=accuracy, qa_low=0.0, qa_high=1.0, format_leak=0.0, kl=0.1
    )


def test_a_row_that_forgets_less_is_shipped_when_it_is_not_told_apart() -> None:
    base = row("base", [[0] * 100], "prompt", forgetting=general(0.8))
    best = row("LoRA", [[1] * 52 + [0] * 48], forgetting=general(0.05))
    kept = row("LoRA + replay", [[1] * 50 + [0] * 50], "replay", forgetting=general(0.75))
    rows = [base, best, kept]
    verdict = verdict_on(rows, general(0.8))
    assert verdict.winner is None
    assert verdict.level == ("LoRA", "LoRA + replay")
    assert verdict.ship == "LoRA + replay"
    assert "75.0 % of general questions" in verdict.findings[-1]


def test_a_cheaper_row_far_below_the_best_is_not_shipped_for_want_of_items() -> None:
    """Twelve items tell nothing apart; that is no reason to ship what looks far worse."""
    base = row("base", [[0] * 12], "prompt")
    best = row("LoRA", [[1] * 10 + [0] * 2], cost=Cost(prompt_tokens=30, bytes=10_000))
    cheap = row("IA3", [[1] * 6 + [0] * 6], cost=Cost(prompt_tokens=30, bytes=10))
    verdict = verdict_on([base, best, cheap])
    assert set(verdict.level) == {"LoRA", "IA3"}
    assert verdict.ship == "LoRA"
