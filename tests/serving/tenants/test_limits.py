"""What a limit lets through and what it refuses, in which words; on a clock that the tests turn."""

import pytest

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
from serving.tenants.meter import Meter
from tests.serving.tenants.metering import ACME, NAME, Still, begin, end, enter, headers, limit


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
