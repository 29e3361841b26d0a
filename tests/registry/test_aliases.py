"""Aliases: moved with a reason, from what is known to be there, and back again."""

import threading
from typing import Any

import pytest
from sqlalchemy import Engine, event

from registry.adapter import Selector
from registry.errors import (
    AliasNotFound,
    Conflict,
    Refused,
)
from registry.store import Registry
from tests.registry.making import BASE_ID
from tests.registry.stored import FAILED_GATE, NAME, Adapter, production, promote, push, rollback


def test_promotes_stack_and_rollbacks_pop(registry: Registry, adapter: Adapter) -> None:
    for seed in range(4):
        push(registry, adapter(seed=seed))
    for number in (1, 2, 3):
        promote(registry, number)
    assert rollback(registry).alias.number == 2
    assert promote(registry, 4).previous == 2
    assert [rollback(registry).alias.number for _ in range(2)] == [2, 1]
    with pytest.raises(Conflict, match="nothing to roll back to"):
        rollback(registry)
    assert production(registry) == 1
    moves = [(event.action, event.number, event.previous) for event in registry.history(NAME)]
    assert moves == [
        ("promote", 1, None),
        ("promote", 2, 1),
        ("promote", 3, 2),
        ("rollback", 2, 3),
        ("promote", 4, 2),
        ("rollback", 2, 4),
        ("rollback", 1, 2),
    ]
    generations = [event.generation for event in registry.history(NAME, "production")]
    assert generations == list(range(1, 8))


def test_promoting_what_is_there_already_changes_nothing(
    registry: Registry, adapter: Adapter
) -> None:
    push(registry, adapter())
    first = promote(registry, 1)
    again = promote(registry, 1)
    assert first.moved
    assert not again.moved
    assert again.alias == first.alias
    assert registry.last_event() == first.alias.event_seq


def test_aliases_move_independently(registry: Registry, adapter: Adapter) -> None:
    for seed in range(2):
        push(registry, adapter(seed=seed))
    promote(registry, 1)
    promote(registry, 2, alias="canary")
    assert production(registry) == 1
    assert registry.resolve(Selector.parse("acme/support@canary")).number == 2
    assert [a.alias for a in registry.aliases(NAME)] == ["canary", "production"]
    assert registry.all_aliases() == registry.aliases(NAME)
    with pytest.raises(AliasNotFound):
        registry.history(NAME, "staging")


def test_all_aliases_come_with_their_versions_in_one_query(
    registry: Registry, adapter: Adapter
) -> None:
    """A server with ten thousand of them would ask for seconds at its start."""
    for seed in range(2):
        push(registry, adapter(seed=seed))
    promote(registry, 1)
    promote(registry, 2, alias="canary")
    asked: list[str] = []

    def note(*call: Any) -> None:
        asked.append(call[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        found = dict(registry.aliased(BASE_ID))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert found == {a: registry.resolve(Selector(NAME, alias=a)) for a in ("production", "canary")}
    assert len([statement for statement in asked if "SELECT" in statement]) == 1
    assert registry.aliased("another/base") == []


def test_a_version_that_failed_its_gate_is_promoted_only_by_force(
    registry: Registry, adapter: Adapter
) -> None:
    push(registry, adapter(card=FAILED_GATE))
    with pytest.raises(Conflict, match=r"accuracy 0\.41"):
        promote(registry, 1)
    assert registry.aliases(NAME) == []
    promote(registry, 1, force=True)
    assert [event.forced for event in registry.history(NAME)] == [True]


def test_a_promote_from_a_stale_view_conflicts(registry: Registry, adapter: Adapter) -> None:
    for seed in range(3):
        push(registry, adapter(seed=seed))
    promote(registry, 1, expected_generation=0)
    promote(registry, 2, expected_generation=1)
    with pytest.raises(Conflict, match="moved by somebody else"):
        promote(registry, 3, expected_generation=1)
    assert production(registry) == 2


def test_of_many_racing_promotes_exactly_one_wins_each_generation(
    registry: Registry, adapter: Adapter
) -> None:
    for seed in range(8):
        push(registry, adapter(seed=seed))
    promote(registry, 8)
    won: list[tuple[int, int]] = []
    lost: list[Conflict] = []
    barrier = threading.Barrier(7, timeout=30)

    def race(number: int) -> None:
        for generation in range(1, 11):
            barrier.wait()
            try:
                promote(registry, number, expected_generation=generation)
                won.append((generation, number))
            except Conflict as error:
                lost.append(error)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(1, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A promote to where the alias points already wins without moving it, so count the moves.
    moves = registry.history(NAME)[1:]
    assert [event.generation for event in moves] == list(range(2, len(moves) + 2))
    assert {(e.generation, e.number) for e in moves} <= {(g + 1, n) for g, n in won}
    assert len(won) + len(lost) == 70
    assert lost
    assert production(registry) == moves[-1].number


@pytest.mark.parametrize("reason", ["", "   ", "x" * 2001])
def test_a_move_needs_a_reason(registry: Registry, adapter: Adapter, reason: str) -> None:
    push(registry, adapter())
    with pytest.raises(Refused, match="reason"):
        registry.promote(NAME, 1, reason=reason, actor="tester")
