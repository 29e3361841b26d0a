"""When all answers have ended nothing is held, and what was used is counted once."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tenants.ledger import Ledger
from serving.tenants.limit import LimitReached, Subject
from serving.tenants.meter import Lease, Meter
from tests.serving.tenants.metering import ACME, NAME, Still, begin, end, joined, limit, used


def uneven(meters: list[Meter], expected: int) -> list[str]:
    """Return what does not add up when all answers have ended and everything is written."""
    for meter in meters:
        meter.flush()
    stands = meters[0].balances.look(ACME)
    assert stands.tokens is not None
    found = {
        "held in memory": [m.tally.holdings() for m in meters] != [{}] * len(meters),
        "held in the database": (stands.answers, stands.held) != (0, 0),
        "usage": used(meters[0]) != expected,
        "sums": stands.day != expected,
        "bucket": stands.tokens.remaining != stands.tokens.size - expected,
    }
    return [name for name, wrong in found.items() if wrong]


Answer = tuple[int, str, int, int, float, int]
ANSWERS = st.tuples(
    st.integers(0, 1),  # server
    st.sampled_from([NAME, "acme/other", "base"]),
    st.integers(0, 50),  # prompt
    st.integers(1, 200),  # the most it may answer
    st.floats(0, 1),  # the share of it that it does
    st.integers(0, 30),  # ends after so many others have begun
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ANSWERS, max_size=25), st.sets(st.integers(0, 24)))
def test_reserved_balances_return_to_zero_and_usage_is_what_was_used(
    tmp_path_factory: pytest.TempPathFactory,
    answers: list[Answer],
    flushed: set[int],
) -> None:
    clock = Still()
    home = tmp_path_factory.mktemp("home")
    meters = [joined(Meter(Ledger(home), "first", clock), [])]
    try:
        limit(meters[0], tokens_per_minute=1000, tokens_per_day=5000)
        limit(meters[0], Subject("acme", NAME), tokens_per_minute=500)
        meters[0].flush()
        second = Meter(Ledger(home), "second", clock)
        total = run(meters, answers, flushed, lambda: joined(second, meters[:]))
        assert uneven(meters, total) == []
    finally:
        for meter in meters:
            meter.stop()


def run(
    meters: list[Meter],
    answers: list[Answer],
    flushed: set[int],
    second: Callable[[], Meter],
) -> int:
    """Run answers that overlap, half of them before a second server joins; return their tokens."""
    running: list[tuple[int, Lease, int, int]] = []
    total = 0
    for number, (asked, name, prompt, most, share, later) in enumerate(answers):
        if number == len(answers) // 2:
            meters.append(second())
        server = asked % len(meters)
        for ended in [entry for entry in running if entry[0] <= number]:
            running.remove(ended)
            end(*ended[1:])
        try:
            lease = begin(meters[server], prompt, most, name=name)
        except LimitReached:
            continue
        completion = round(share * most)
        total += prompt + completion
        running.append((number + later, lease, prompt, completion))
        if number in flushed:
            meters[server].flush()
    for entry in running:
        end(*entry[1:])
    return total


def test_the_check_above_sees_an_answer_that_is_never_settled(meter: Meter) -> None:
    limit(meter, tokens_per_minute=1000, tokens_per_day=5000)
    end(begin(meter, 10, 100), 10, 50)
    assert uneven([meter], 60) == []
    begin(meter, 10, 100)  # aborted, and forgotten
    assert set(uneven([meter], 60)) == {"held in memory", "held in the database", "bucket"}


def test_the_check_above_sees_a_reservation_that_is_kept_whole(meter: Meter) -> None:
    limit(meter, tokens_per_minute=1000, tokens_per_day=5000)
    end(begin(meter, 10, 100), 10, 100)  # 10 were used, and all are charged
    assert set(uneven([meter], 20)) == {"usage", "sums", "bucket"}


def test_settling_twice_counts_once(meter: Meter) -> None:
    lease = begin(meter, 10, 100)
    end(lease, 10, 50)
    end(lease, 10, 50)
    meter.flush()
    assert used(meter) == 60
    assert meter.tally.holdings() == {}
