"""Limits and usage without HTTP: on a clock that the tests turn, and on two servers at once."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.errors import StoreUnavailable, WardrobeError
from serving.tenants import balances
from serving.tenants.ledger import Ledger
from serving.tenants.limit import (
    BUILT_IN,
    BudgetSpent,
    Limit,
    LimitInvalid,
    LimitReached,
    NeverFits,
    Subject,
    TooManyAtOnce,
)
from serving.tenants.meter import Lease, Meter
from serving.tenants.standing import Clock, Period
from serving.tenants.usage import Span

ACME = Subject("acme")
NAME = "acme/support"
DIGEST = "d" * 64
ALWAYS = Span("2000", "2100")


class Still(Clock):
    """A clock and a calendar that only move when they are told to."""

    def __init__(self) -> None:
        self._passed = 0.0  # seconds
        super().__init__(self._seconds, self._period)

    def _seconds(self) -> float:
        return 1000.0 + self._passed

    def _period(self) -> Period:
        return Period(datetime(2026, 11, 25, 13, 59, tzinfo=UTC) + timedelta(seconds=self._passed))

    def pass_(self, seconds: float) -> None:
        self._passed += seconds


@pytest.fixture
def clock() -> Still:
    return Still()


@pytest.fixture
def servers(tmp_path: Path, clock: Still) -> Iterator[Callable[[str], Meter]]:
    """Makes servers of one home; none of them writes by itself."""
    made: list[Meter] = []

    def make(name: str) -> Meter:
        made.append(joined(Meter(Ledger(tmp_path), name, clock), made))
        return made[-1]

    yield make
    for meter in made:
        meter.stop()


def joined(new: Meter, others: list[Meter]) -> Meter:
    """Let a server join those that run; each notices when it writes next."""
    joining = threading.Thread(target=new.join)
    joining.start()
    while joining.is_alive():
        for other in others:
            other.flush()
        joining.join(0.005)
    return new


@pytest.fixture
def meter(servers: Callable[[str], Meter]) -> Meter:
    return servers("one")


def limit(meter: Meter, subject: Subject = ACME, **values: int | None) -> None:
    meter.ledger.set_limit(subject, values, actor="test", reason="test")


def enter(meter: Meter, tenant: str = "acme", name: str = NAME) -> Lease:
    lease = meter.lease(tenant, name)
    lease.enter()
    return lease


def begin(meter: Meter, prompt: int, answer: int, tenant: str = "acme", name: str = NAME) -> Lease:
    lease = enter(meter, tenant, name)
    try:
        lease.reserve(prompt, answer)
    except WardrobeError:
        end(lease, 0, 0)
        raise
    return lease


def end(lease: Lease, prompt: int, completion: int) -> None:
    lease.settle(digest=DIGEST, version=f"{NAME}@v1", prompt=prompt, completion=completion)


def headers(lease: Lease) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in lease.headers}


def used(meter: Meter) -> int:
    return sum(row.total_tokens for row in meter.ledger.usage(ALWAYS, "hour"))


# Buckets


def test_requests_run_out_and_come_back_with_time(meter: Meter, clock: Still) -> None:
    limit(meter, requests_per_minute=2)
    for _ in range(2):
        end(enter(meter), 0, 0)
    with pytest.raises(LimitReached, match=r"2 requests a minute.*30 seconds") as refused:
        enter(meter)
    assert refused.value.retry_after == 30
    clock.pass_(30)
    end(enter(meter), 0, 0)
    with pytest.raises(LimitReached):
        enter(meter)


def test_an_answer_pays_for_what_it_used_and_not_for_what_it_might_have(meter: Meter) -> None:
    limit(meter, tokens_per_minute=100)
    for left in (90, 80, 70):
        lease = begin(meter, 5, 65)
        assert headers(lease)["x-ratelimit-remaining-tokens"] == str(left + 10 - 70)
        end(lease, 5, 5)
    with pytest.raises(LimitReached, match="has 70 left"):
        begin(meter, 5, 66)


def test_what_can_never_fit_is_told_apart_from_what_does_not_fit_now(meter: Meter) -> None:
    limit(meter, tokens_per_minute=100, tokens_per_day=90)
    with pytest.raises(NeverFits, match=r"101 tokens, 1 of its prompt.*100 a minute.*never run"):
        begin(meter, 1, 100)
    with pytest.raises(NeverFits, match="90 a day"):
        begin(meter, 1, 91)


def test_a_name_has_a_limit_of_its_own_beside_its_tenants(meter: Meter) -> None:
    limit(meter, tokens_per_minute=100)
    limit(meter, Subject("acme", NAME), tokens_per_minute=30)
    first = begin(meter, 5, 15)
    assert headers(first)["x-ratelimit-limit-tokens"] == "30"
    with pytest.raises(LimitReached, match="acme with acme/support may use 30"):
        begin(meter, 5, 15)
    other = begin(meter, 5, 65, name="acme/other")
    assert headers(other)["x-ratelimit-remaining-tokens"] == "10", "the refused one took nothing"
    with pytest.raises(LimitReached, match="acme may use 100"):
        begin(meter, 5, 15, name="acme/other")


def test_everybody_has_the_limit_of_everybody_for_itself(meter: Meter) -> None:
    limit(meter, Subject("*"), requests_per_minute=1)
    limit(meter, Subject("big"), requests_per_minute=3)
    enter(meter, "acme")
    enter(meter, "beta")
    for tenant in ("acme", "beta"):
        with pytest.raises(LimitReached):
            enter(meter, tenant)
    for _ in range(3):
        enter(meter, "big")


def test_without_any_limit_the_headers_tell_the_built_in_one(meter: Meter) -> None:
    told = headers(begin(meter, 5, 5))
    assert told["x-ratelimit-limit-requests"] == str(BUILT_IN.requests_per_minute)
    assert told["x-ratelimit-limit-tokens"] == str(BUILT_IN.tokens_per_minute)
    assert set(told) == {
        f"x-ratelimit-{what}-{kind}"
        for what in ("limit", "remaining", "reset")
        for kind in ("requests", "tokens")
    }


def test_a_changed_limit_holds_for_the_next_request(meter: Meter) -> None:
    limit(meter, requests_per_minute=1)
    enter(meter)
    with pytest.raises(LimitReached):
        enter(meter)
    limit(meter, requests_per_minute=None)
    enter(meter)
    limit(meter, requests_per_minute=1)
    meter.ledger.clear_limit(ACME, actor="test", reason="test")
    enter(meter)


# Concurrency and budgets


def test_as_many_answers_run_as_may(meter: Meter) -> None:
    limit(meter, concurrent=2)
    first, _ = enter(meter), enter(meter)
    with pytest.raises(TooManyAtOnce, match="2 answers of acme run"):
        enter(meter)
    end(first, 0, 0)
    enter(meter)


def test_a_budget_counts_what_is_used_and_what_may_yet_be(meter: Meter, clock: Still) -> None:
    limit(meter, tokens_per_day=100)
    running = begin(meter, 10, 40)
    with pytest.raises(BudgetSpent, match="50 are used or reserved") as refused:
        begin(meter, 10, 41)
    assert refused.value.retry_after == 10 * 3600 + 60
    end(running, 10, 20)
    for flush in (False, True):
        if flush:
            meter.flush()
        with pytest.raises(BudgetSpent):
            begin(meter, 10, 61)
        end(begin(meter, 10, 60), 0, 0)
    clock.pass_(11 * 3600)  # the next day
    end(begin(meter, 10, 90), 10, 90)
    meter.flush()
    stands = meter.balances.look(ACME)
    assert (stands.day, stands.month, stands.held) == (100, 130, 0)


def test_a_month_that_is_spent_says_when_the_next_begins(meter: Meter) -> None:
    limit(meter, tokens_per_month=100)
    end(begin(meter, 50, 50), 50, 50)
    with pytest.raises(BudgetSpent, match="100 are used or") as refused:
        begin(meter, 1, 1)
    assert refused.value.retry_after == 5 * 86400 + 10 * 3600 + 60


# Several servers


def test_servers_of_one_home_share_every_limit(servers: Callable[[str], Meter]) -> None:
    one, two = servers("one"), servers("two")
    limit(one, requests_per_minute=4, tokens_per_minute=100, concurrent=3, tokens_per_day=300)
    begin(one, 10, 20)
    begin(two, 10, 20)
    with pytest.raises(LimitReached, match="has 40 left"):
        begin(one, 10, 40)
    one.flush()  # so that the other one knows that it has ended
    lease = begin(two, 10, 20)
    with pytest.raises(TooManyAtOnce, match="3 answers"):
        enter(one)
    end(lease, 10, 0)
    two.flush()
    with pytest.raises(LimitReached, match="4 requests"):
        enter(one)


def test_no_two_servers_take_the_same_request(
    servers: Callable[[str], Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balances, "BUSY_SECONDS", 60.0)  # the machine may be slow here
    four = [servers(f"server {number}") for number in range(4)]
    limit(four[0], requests_per_minute=50)
    passed: list[Lease] = []

    def ask(meter: Meter) -> None:
        for _ in range(40):
            try:
                passed.append(enter(meter))
            except LimitReached:
                return

    threads = [threading.Thread(target=ask, args=(meter,)) for meter in four]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [meter.balances.problem for meter in four] == [""] * 4
    assert len(passed) == 50


def test_a_budget_is_shared_with_what_another_server_has_not_written_yet(
    servers: Callable[[str], Meter],
) -> None:
    one, two = servers("one"), servers("two")
    limit(one, tokens_per_day=100)
    end(begin(one, 10, 50), 10, 30)
    with pytest.raises(BudgetSpent):
        begin(two, 10, 60)
    one.flush()
    begin(two, 10, 50)
    with pytest.raises(BudgetSpent):
        begin(one, 0, 1)


def test_what_a_dead_server_held_is_free(servers: Callable[[str], Meter]) -> None:
    dead, alive = servers("dead"), servers("alive")
    limit(alive, concurrent=1, tokens_per_day=100)
    begin(dead, 10, 80)
    with pytest.raises(TooManyAtOnce):
        enter(alive)
    alive.flush()
    with pytest.raises(TooManyAtOnce):
        enter(alive)
    dead.presence.lock.release()  # as the system does it
    alive.flush()
    end(begin(alive, 10, 80), 0, 0)
    assert alive.balances.alone


# One server


def test_a_server_that_is_alone_needs_no_database_for_a_known_tenant(meter: Meter) -> None:
    limit(meter, requests_per_minute=4, tokens_per_minute=100)
    meter.flush()  # sees that nobody else is there
    end(begin(meter, 5, 45), 5, 5)
    meter.flush()
    with meter.ledger.writing():  # somebody else holds it
        end(begin(meter, 5, 75), 5, 5)
        with pytest.raises(LimitReached, match="has 80 left"):
            begin(meter, 5, 76)
        assert meter.balances.problem == ""
    limit(meter, requests_per_minute=5)
    meter.flush()
    assert headers(begin(meter, 5, 75))["x-ratelimit-remaining-tokens"] == "0"
    enter(meter)
    with pytest.raises(LimitReached, match="5 requests"):
        enter(meter)


def test_names_of_one_tenant_take_from_the_same_memory(meter: Meter) -> None:
    limit(meter, requests_per_minute=3)
    meter.flush()
    for name in (NAME, "acme/other", NAME):
        enter(meter, name=name)
    with pytest.raises(LimitReached):
        enter(meter, name="acme/third")


def test_what_a_server_kept_in_memory_is_known_to_one_that_joins(
    servers: Callable[[str], Meter],
) -> None:
    one = servers("one")
    limit(one, requests_per_minute=3, tokens_per_day=100)
    one.flush()
    enter(one)
    begin(one, 5, 45)
    assert one.balances.alone
    two = servers("two")
    assert not one.balances.alone
    with pytest.raises(BudgetSpent, match="50 are used or reserved"):
        begin(two, 5, 46)
    for meter in (one, two):
        with pytest.raises(LimitReached, match="3 requests"):
            enter(meter)


def test_what_a_lone_server_could_not_write_it_keeps_in_memory(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(meter, requests_per_minute=3)
    meter.flush()
    enter(meter)
    enter(meter)

    def broken(*_: object) -> None:
        raise StoreUnavailable("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("serving.tenants.rollup.RollUp.hold", broken)
        with pytest.raises(StoreUnavailable):
            meter.flush()
    enter(meter)
    meter.flush()
    with pytest.raises(LimitReached):
        enter(meter)


# What is left in the end


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


# When the database fails


def test_without_its_database_a_server_goes_on_with_what_it_knew(
    meter: Meter, clock: Still
) -> None:
    limit(meter, requests_per_minute=3)
    end(begin(meter, 1, 9), 1, 9)
    with meter.ledger.writing():  # somebody else holds it
        lease = enter(meter)
        assert "locked" in meter.balances.problem
        assert headers(lease)["x-ratelimit-remaining-requests"] == "1"
        enter(meter)
        with pytest.raises(LimitReached):
            enter(meter)
        enter(meter, "beta")  # was never seen: nothing is known against it
    clock.pass_(balances.AGAIN_SECONDS)
    enter(meter)
    assert meter.balances.problem == ""
    assert headers(enter(meter))["x-ratelimit-remaining-requests"] == "0", "shared again"


def test_a_lone_server_asks_again_for_what_it_could_not_read(meter: Meter, clock: Still) -> None:
    limit(meter, requests_per_minute=1)
    meter.flush()  # sees that nobody else is there
    with meter.ledger.writing():  # somebody else holds it
        enter(meter)
        enter(meter)
        assert "locked" in meter.balances.problem
    meter.flush()
    clock.pass_(balances.AGAIN_SECONDS)
    enter(meter)
    assert meter.balances.problem == ""
    with pytest.raises(LimitReached, match="1 requests a minute"):
        enter(meter)


def test_what_could_not_be_written_is_written_the_next_time(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(begin(meter, 10, 100), 10, 50)
    holding = meter.tally.holding(ACME)

    def broken(*_: object) -> None:
        raise StoreUnavailable("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("serving.tenants.rollup.RollUp.hold", broken)
        with pytest.raises(StoreUnavailable):
            meter.flush()
    assert meter.tally.holding(ACME) == holding
    assert used(meter) == 0
    meter.flush()
    assert used(meter) == 60


KILLED = """
    import sys
    from pathlib import Path
    from serving.tenants.ledger import Ledger
    from serving.tenants.meter import Meter

    meter = Meter(Ledger(Path(sys.argv[1])), "killed")
    meter.join()
    meter.start()
    number = 0
    while True:
        lease = meter.lease("acme", "acme/support")
        lease.enter()
        lease.reserve(1, 9)
        lease.settle(digest="d" * 64, version="acme/support@v1", prompt=1, completion=9)
        number += 1
        if number % 50 == 0:
            meter.flush()
            print(number, flush=True)
"""


def test_what_was_written_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        written = [int(child.stdout.readline()) for _ in range(4)][-1]
        os.kill(child.pid, signal.SIGKILL)
        rest = [int(line) for line in child.stdout.read().split()]
    last = max([written, *rest])
    after = Meter(Ledger(tmp_path), "after")
    after.join()  # and does not wait for who was killed
    answers = sum(row.answers for row in after.ledger.usage(ALWAYS, "hour"))
    after.stop()
    assert last <= answers <= last + 50


def test_stopping_writes_what_is_left(tmp_path: Path) -> None:
    meter = Meter(Ledger(tmp_path), "one")
    meter.join()
    meter.start()
    end(begin(meter, 10, 100), 10, 50)
    meter.stop()
    with Ledger(tmp_path) as ledger:
        assert [row.total_tokens for row in ledger.usage(ALWAYS, "hour")] == [60]


# Asking


def test_usage_is_kept_by_tenant_name_version_and_hour(meter: Meter, clock: Still) -> None:
    end(begin(meter, 1, 9), 1, 9)
    end(begin(meter, 1, 9, tenant="beta"), 1, 8)
    clock.pass_(60)  # the next hour
    end(begin(meter, 1, 9), 1, 7)
    other = begin(meter, 1, 9)
    other.settle(digest="e" * 64, version=f"{NAME}@v2", prompt=1, completion=6)
    meter.flush()
    rows = meter.ledger.usage(ALWAYS, "hour", "acme")
    assert [(r.time, r.version, r.answers, r.completion_tokens) for r in rows] == [
        ("2026-11-25T13", f"{NAME}@v1", 1, 9),
        ("2026-11-25T14", f"{NAME}@v1", 1, 7),
        ("2026-11-25T14", f"{NAME}@v2", 1, 6),
    ]
    assert len(meter.ledger.usage(ALWAYS, "day")) == 3
    assert len(meter.ledger.usage(ALWAYS, "version", "acme")) == 2
    assert len(meter.ledger.usage(Span("2026-11-25T14", "2026-11-25"), "hour")) == 2
    assert meter.ledger.usage(Span("2026-11-26", "2026-12"), "hour") == []


@pytest.mark.parametrize("values", [{"concurrent": 0}, {"tokens_per_day": -1}])
def test_no_limit_is_zero_or_less(meter: Meter, values: dict[str, int]) -> None:
    with pytest.raises(LimitInvalid, match="it takes 1 to"):
        meter.ledger.set_limit(ACME, values, actor="test", reason="test")
    assert meter.ledger.limits() == {}


def test_every_change_of_a_limit_is_in_its_history(meter: Meter) -> None:
    limit(meter, concurrent=2)
    limit(meter, tokens_per_day=100)
    assert meter.ledger.clear_limit(ACME, actor="ops", reason="no more")
    assert not meter.ledger.clear_limit(ACME, actor="ops", reason="again")
    history = meter.ledger.limit_history("acme")
    assert [event.reason for event in history] == ["test", "test", "no more"]
    assert history[1].after == Limit(concurrent=2, tokens_per_day=100)
    assert history[2].after is None
