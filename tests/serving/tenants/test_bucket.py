"""The token bucket, on a clock that the tests turn."""

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.tenants.bucket import SECONDS, Bucket

SIZES = st.integers(1, 10**6)
GAPS = st.floats(0, 300)
SHARES = st.floats(0, 1)
UNTIMED = settings(deadline=None)


@UNTIMED
@given(SIZES, st.lists(st.tuples(GAPS, SHARES), max_size=40))
def test_no_span_of_time_lets_more_pass_than_a_full_bucket_and_what_it_gains(
    size: int, asked: list[tuple[float, float]]
) -> None:
    bucket, now, passed = Bucket.full(size, 0.0), 0.0, [(0.0, 0.0)]
    for gap, share in asked:
        now += gap
        bucket = bucket.moved_to(now)
        assert 0 <= bucket.level <= size
        if bucket.holds(amount := round(share * size)):
            bucket = bucket.take(amount)
            passed.append((now, amount))
    for first, (start, _) in enumerate(passed):
        taken = 0.0
        for moment, amount in passed[first:]:
            taken += amount
            assert taken <= size * (1 + (moment - start) / SECONDS) + 1e-3


@UNTIMED
@given(SIZES, SHARES, SHARES)
def test_what_is_asked_for_is_there_after_the_told_wait_and_not_before(
    size: int, taken: float, asked: float
) -> None:
    bucket = Bucket.full(size, 0.0).take(taken * size)
    wait = bucket.wait(asked * size)
    assert bucket.moved_to(wait).holds(asked * size)
    if wait * size > 1:
        assert not bucket.moved_to(wait * 0.99).holds(asked * size)


@UNTIMED
@given(SIZES, st.lists(st.tuples(SHARES, SHARES), max_size=30))
def test_reserving_and_settling_at_once_is_the_same_as_taking_what_was_used(
    size: int, answers: list[tuple[float, float]]
) -> None:
    reserved = taken = Bucket.full(size, 0.0)
    for share, used in answers:
        most = share * reserved.level
        reserved = reserved.take(most).give_back(most - used * most)
        taken = taken.take(used * most)
    assert abs(reserved.level - taken.level) < 1e-6 * size + 1e-3


@UNTIMED
@given(SIZES, SHARES, st.lists(st.tuples(GAPS, SHARES, SHARES), max_size=30))
def test_a_settled_reservation_never_leaves_less_than_it_used(
    size: int, first: float, answers: list[tuple[float, float, float]]
) -> None:
    """Tokens that were reserved and not used all come back, however long the answer took."""
    now = 0.0
    reserved = taken = Bucket.full(size, now).take(first * size)
    for gap, share, used in answers:
        most = share * min(reserved.level, taken.level)
        reserved, taken = reserved.take(most), taken.take(used * most)
        now += gap
        reserved = reserved.moved_to(now).give_back(most - used * most)
        taken = taken.moved_to(now)
        assert taken.level - 1e-3 <= reserved.level <= size


@UNTIMED
@given(SIZES, SHARES, st.floats(-1e6, 0))
def test_a_clock_that_is_set_back_gains_nothing_and_stops_nothing(
    size: int, taken: float, back: float
) -> None:
    bucket = Bucket.full(size, 0.0).take(taken * size)
    assert bucket.moved_to(back).level == bucket.level
    assert bucket.moved_to(back).moved_to(back + SECONDS).level == size


@UNTIMED
@given(SIZES, SIZES, SHARES)
def test_a_new_size_is_in_force_at_once_and_keeps_what_was_taken(
    size: int, other: int, taken: float
) -> None:
    changed = Bucket(other, taken * size, 0.0).moved_to(0.0)
    assert changed.level == max(0.0, other - taken * size)
