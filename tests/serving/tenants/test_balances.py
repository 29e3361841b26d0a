"""Who knows the buckets: servers of one home, a server that is alone, one without its database."""

import threading
from collections.abc import Callable

import pytest

from registry.errors import StoreUnavailable
from serving.tenants import balances
from serving.tenants.limit import BudgetSpent, LimitReached, TooManyAtOnce
from serving.tenants.meter import Lease, Meter
from tests.serving.tenants.metering import NAME, Still, begin, end, enter, headers, limit


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
