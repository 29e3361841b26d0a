"""Two answers compared, and what many pairs add up to: against plain counting and simulation."""

import math
from pathlib import Path

import numpy as np
import pytest

from registry.adapter import AdapterName
from serving.engine.boundary import TokenLogprob
from serving.experiments.experiment import Arm
from serving.experiments.sequential import MIN_UNITS, Sums, mean_of
from serving.shadow.comparison import Comparison
from serving.shadow.pair import Pair, Side, compare, is_structured
from serving.shadow.report import describe, read, readings
from serving.shadow.store import Comparisons, Tally
from serving.shadow.sums import MEASURES, Measured

NAME = AdapterName("acme", "support")


def side(*tokens: int, text: str = "", stopped: bool = True, top: int = 0) -> Side:
    logprobs = [TokenLogprob(t, -0.1, tuple((t + i, -0.1 - i) for i in range(top))) for t in tokens]
    return Side(tokens, text, stopped, 1.0, logprobs)


def pair_of(production: Side, candidate: Side) -> Pair:
    return compare("shd_1", "k", "u", production, candidate, json_asked=False)


@pytest.mark.parametrize(
    ("a", "b", "prefix", "equal", "same"),
    [
        ((1, 2, 3), (1, 2, 3), 1, 1, True),
        ((1, 2, 3), (1, 9, 3), 1 / 3, 2 / 3, False),
        ((1, 2, 3), (1, 2), 2 / 3, 2 / 3, False),
        ((1,), (1, 2, 3, 4), 1 / 4, 1 / 4, False),
        ((9, 2), (1, 2), 0, 1 / 2, False),
        ((), (), 1, 1, True),
        ((), (1,), 0, 0, False),
    ],
)
def test_agreement_is_the_share_of_equal_tokens_of_the_longer_answer(
    a: tuple[int, ...], b: tuple[int, ...], prefix: float, equal: float, same: bool
) -> None:
    for one, other in ((a, b), (b, a)):
        found = pair_of(side(*one), side(*other))
        assert (found.prefix, found.equal) == (pytest.approx(prefix), pytest.approx(equal))
        assert found.same is same
        assert (found.production_tokens, found.candidate_tokens) == (len(one), len(other))


def test_equal_tokens_that_end_differently_are_not_the_same() -> None:
    assert not pair_of(side(1, 2), side(1, 2, stopped=False)).same


@pytest.mark.parametrize(
    ("production", "candidate", "logprob", "tokens", "bounded"),
    [
        ((5, 6), (5, 6), -0.2, 2, False),
        ((5, 7, 8), (5, 6, 8), -0.1 - 1.1, 2, False),  # 7 is the candidate's second choice for 6
        ((5, 99, 8), (5, 6, 8), -0.1 - 2.1, 2, True),  # not among three: the least of them
        ((5, 6, 7), (5, 6), -0.2, 2, False),  # it stopped: what it thinks of 7 is not known
        ((), (5,), None, 0, False),
    ],
)
def test_the_candidates_opinion_ends_with_the_first_different_token(
    production: tuple[int, ...],
    candidate: tuple[int, ...],
    logprob: float | None,
    tokens: int,
    bounded: bool,
) -> None:
    found = pair_of(side(*production), side(*candidate, top=3))
    assert found.logprob == (None if logprob is None else pytest.approx(logprob))
    assert (found.logprob_tokens, found.logprob_bounded) == (tokens, bounded)
    assert found.production_logprob == (pytest.approx(-0.1 * tokens) if tokens else None)


def test_json_is_an_object_or_a_list_and_is_expected_where_production_gives_it() -> None:
    good = ['{"a": 1}', " [1, 2]", "{}"]
    bad = ["", "42", '"text"', "null", '{"a": 1', "[1,]", "[" * 100_000, "{'a': 1}", '{"a": NaN}']
    assert all(map(is_structured, good))
    assert not any(map(is_structured, bad))
    kept = pair_of(side(1, text="{}"), side(1, text="[]"))
    broken = pair_of(side(1, text="{}"), side(1, text="{"))
    free = pair_of(side(1, text="hello"), side(1, text="{}"))
    assert [p.json_expected for p in (kept, broken, free)] == [True, True, False]
    assert [p.candidate_json for p in (kept, broken, free)] == [True, False, True]
    asked = compare("s", "k", "u", side(1, text="hello"), side(1, text="{}"), json_asked=True)
    assert (asked.json_expected, asked.production_json, asked.candidate_json) == (True, False, True)


def comparison(store: Comparisons) -> Comparison:
    arms = Arm("control", 0.5, NAME, 1, "a" * 64), Arm("treatment", 0.5, NAME, 2, "b" * 64)
    return store.start(NAME, *arms, 1.0, "test")


def random_pair(generator: np.random.Generator, shadow: str, number: int, units: int) -> Pair:
    key, unit = f"k{number}", f"u{generator.integers(units)}"
    if generator.random() < 0.1:
        return Pair(shadow, key, unit, failed=True)
    return Pair(
        shadow,
        key,
        unit,
        same=bool(generator.random() < 0.6),
        prefix=float(generator.random()),
        equal=float(generator.random()),
        production_tokens=int(generator.integers(1, 50)),
        candidate_tokens=int(generator.integers(1, 50)),
        production_stopped=bool(generator.random() < 0.8),
        candidate_stopped=bool(generator.random() < 0.7),
        logprob=-float(generator.random()) if generator.random() < 0.9 else None,
        production_logprob=-float(generator.random()) if generator.random() < 0.5 else None,
        logprob_tokens=int(generator.integers(1, 20)),
        json_expected=bool(generator.random() < 0.3),
        production_json=bool(generator.random() < 0.9),
        candidate_json=bool(generator.random() < 0.7),
        production_seconds=float(generator.random()) if generator.random() < 0.9 else None,
        candidate_seconds=float(generator.random()),
    )


def parts(pair: Pair) -> dict[str, tuple[float, float]]:
    """Return numerator and denominator of every measure, in Python."""
    timed = pair.production_seconds is not None and pair.candidate_seconds is not None
    known = pair.logprob is not None
    both = known and pair.production_logprob is not None
    of = {
        "same": (pair.same, 1.0),
        "prefix": (pair.prefix, 1.0),
        "equal": (pair.equal, 1.0),
        "length": (pair.candidate_tokens - pair.production_tokens, 1.0),
        "ended": (int(pair.candidate_stopped) - int(pair.production_stopped), 1.0),
        "json": (int(pair.candidate_json) - int(pair.production_json), float(pair.json_expected)),
        "logprob": (pair.logprob or 0.0, pair.logprob_tokens * known),
        "logprob_difference": (
            (pair.logprob or 0.0) - (pair.production_logprob or 0.0),
            pair.logprob_tokens * both,
        ),
        "slower": (
            math.log(pair.candidate_seconds / pair.production_seconds)
            if pair.candidate_seconds and pair.production_seconds
            else 0.0,
            float(timed),
        ),
    }
    if pair.failed:
        of = dict.fromkeys(of, (0.0, 0.0))
    return {"failed": (float(pair.failed), 1.0), **of}


def test_the_database_sums_what_python_sums_by_unit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    with Comparisons(tmp_path) as store:
        shadow = comparison(store)
        pairs = [random_pair(generator, shadow.id, number, units=40) for number in range(300)]
        store.record(pairs, {(shadow.id, "busy"): 2})
        store.record(pairs[:50], {(shadow.id, "busy"): 3})  # again: pairs count once, counts add
        tally = store.tally(shadow)
    assert (tally.pairs, tally.units) == (300, len({pair.unit for pair in pairs}))
    assert tally.skipped == {"busy": 5}
    assert set(tally.measures) == set(MEASURES)
    for name, measured in tally.measures.items():
        sums = measured.sums
        by_unit: dict[str, list[tuple[float, float]]] = {}
        for pair in pairs:
            y, x = parts(pair)[name]
            by_unit.setdefault(pair.unit, []).append((y if x else 0.0, x))
        rows = np.array([np.sum(values, axis=0) for values in by_unit.values()])
        y, x = rows[rows[:, 1] > 0].T
        expected = (len(x), y.sum(), (y * y).sum(), x.sum(), (x * x).sum(), (x * y).sum())
        found = (sums.n, sums.y, sums.yy, sums.x, sums.xx, sums.xy)
        assert found == pytest.approx(expected), name
        ends = (min(y / x), max(y / x))
        assert (measured.least, measured.most) == pytest.approx(ends), name


def tally_of(same: int, units: int) -> Tally:
    measures = {
        "failed": Measured(Sums.of_means(units, 0, 0)),
        "same": Measured(Sums.of_means(units, same, same), 0, 1),
    }
    return Tally(units, units, 0, 0, 0, {}, measures)


def test_an_interval_is_drawn_from_enough_units_on_and_holds_what_was_seen() -> None:
    for reading in readings(tally_of(MIN_UNITS - 1, MIN_UNITS - 1)):
        assert (reading.low, reading.high) == (None, None)
    failed, same = readings(tally_of(1000, 1000))
    assert failed.low == 0 == failed.value
    assert same.value == 1 == same.high
    assert failed.high is not None
    assert same.low is not None
    assert 0 < failed.high < 0.05
    assert 0.95 < same.low < 1


def test_a_report_without_a_pair_says_so(tmp_path: Path) -> None:
    with Comparisons(tmp_path) as store:
        facts = describe(store, comparison(store))
    assert facts["sentences"] == ["There is no pair yet."]
    assert facts["measures"] == []


RUNS, UNITS, ALPHA = 200, 1500, 0.05
MOST_MISSED = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
SCENARIOS = {  # measure, true mean
    "rare": ("same", 0.02),
    "half": ("same", 0.5),
    "nearly all": ("prefix", 0.98),
    "ratio": ("prefix", 0.3),  # a unit asks one to many times, and its answers go together
    "skewed": ("length", math.exp(0.5)),
    "mostly nothing": ("length", 0.5),
}


def draw(scenario: str) -> tuple[np.ndarray, np.ndarray]:
    """Return numerators and denominators [RUNS, UNITS]."""
    generator = np.random.default_rng(3)
    shape = (RUNS, UNITS)
    x = np.ones(shape)
    if scenario == "skewed":
        return generator.lognormal(0.0, 1.0, shape), x
    if scenario == "mostly nothing":
        return np.where(generator.random(shape) < 0.95, 0.0, generator.normal(10, 20, shape)), x
    if scenario == "ratio":
        x = generator.geometric(0.3, shape).astype(float)
        shares = generator.beta(3, 7, shape)
        return generator.binomial(x.astype(int), shares).astype(float), x
    return (generator.random(shape) < SCENARIOS[scenario][1]).astype(float), x


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_interval_of_a_mean_holds_at_all_looks_together(scenario: str) -> None:
    """Simulated; usual 95 % intervals and, for rare values, those without imagined units fail."""
    measure, truth = SCENARIOS[scenario]
    y, x = draw(scenario)
    sums = [np.cumsum(part, axis=1) for part in (y, y * y, x, x * x, x * y)]
    least, most = np.minimum.accumulate(y / x, axis=1), np.maximum.accumulate(y / x, axis=1)
    missed = np.zeros((3, RUNS), bool)  # ours, without imagined units, looked at as if once
    for run in range(RUNS):
        for n in range(MIN_UNITS, UNITS + 1, 20):
            at = Sums(n, *(float(part[run, n - 1]) for part in sums))
            ours = read(measure, Measured(at, least[run, n - 1], most[run, n - 1]))
            if ours.low is None or ours.high is None:
                continue  # nothing but zeros yet
            bare = mean_of(at, ALPHA)
            half = 1.96 * math.sqrt(at.spread / n)
            missed[:, run] |= [
                not ours.low <= truth <= ours.high,
                not bare.low <= truth <= bare.high,
                abs(at.value - truth) > half,
            ]
    rates = missed.mean(axis=1)
    assert rates[0] <= MOST_MISSED
    assert rates[2] > MOST_MISSED, "the control must fail, or the bound proves nothing"
    if scenario in ("rare", "mostly nothing"):
        assert rates[1] > MOST_MISSED, "else the imagined units would not be needed"
