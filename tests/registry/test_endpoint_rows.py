"""An endpoint is a durable name in front of a selector; every change of it is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest

from registry.adapter import AdapterName, Selector
from registry.endpoints import parse_target
from registry.errors import (
    AdapterNotFound,
    AliasNotFound,
    Conflict,
    EndpointNotFound,
    InvalidName,
    VersionNotFound,
)
from registry.store import Registry

Adapter = Callable[..., Path]
SUPPORT, CHAT = AdapterName("acme", "support"), AdapterName("acme", "chat")


@pytest.fixture
def store(registry: Registry, adapter: Adapter) -> Registry:
    """acme/support@v1 in production."""
    registry.push(adapter(), SUPPORT, actor="test")
    registry.promote(SUPPORT, 1, reason="test", actor="test")
    return registry


def test_an_endpoint_survives_the_process_and_keeps_its_history(store: Registry) -> None:
    made = store.create_endpoint(CHAT, Selector.parse("acme/support"), {"top_p": 0.5}, actor="ann")
    changed = store.change_endpoint(
        CHAT, None, {}, actor="bob", reason="back to the base", expected_generation=1
    )
    with Registry.open(store.home, store.bases) as again:
        assert again.endpoint(CHAT) == changed
        assert again.endpoints("acme") == [changed] == again.endpoints()
        assert again.endpoints("beta") == []
        first, second = again.endpoint_history(CHAT)
    assert (made.model, changed.model) == ("acme/support@production", "base")
    assert (made.generation, changed.generation) == (1, 2)
    assert changed.created_at == made.created_at
    assert (first.action, first.actor, first.model) == ("create", "ann", made.model)
    assert (second.action, second.reason, second.defaults) == ("change", "back to the base", {})
    assert [e.seq for e in store.endpoint_events(first.seq)] == [store.last_endpoint_event()]


def test_a_name_that_comes_back_is_not_taken_for_the_one_before(store: Registry) -> None:
    store.create_endpoint(CHAT, None, {}, actor="ann")
    store.delete_endpoint(CHAT, actor="ann", reason="unused")
    with pytest.raises(EndpointNotFound, match="acme/chat"):
        store.endpoint(CHAT)
    assert store.create_endpoint(CHAT, None, {}, actor="ann").generation == 3
    assert [e.action for e in store.endpoint_history(CHAT)] == ["create", "delete", "create"]


def test_of_two_changes_at_once_the_second_learns_of_the_first(store: Registry) -> None:
    store.create_endpoint(CHAT, None, {}, actor="ann")
    store.change_endpoint(CHAT, None, {"seed": 1}, actor="ann", expected_generation=1)
    with pytest.raises(Conflict, match="generation 2, not 1"):
        store.change_endpoint(CHAT, None, {}, actor="bob", expected_generation=1)
    assert store.endpoint(CHAT).defaults == {"seed": 1}
    with pytest.raises(Conflict, match="already an endpoint"):
        store.create_endpoint(CHAT, None, {}, actor="bob")


def test_a_target_that_cannot_answer_is_refused_at_once(store: Registry) -> None:
    for target, error in {
        "acme/nothing": AdapterNotFound,
        "acme/support@v9": VersionNotFound,
        "acme/support@canary": AliasNotFound,
    }.items():
        with pytest.raises(error):
            store.create_endpoint(CHAT, Selector.parse(target), {}, actor="ann")
    with pytest.raises(InvalidName, match="'base'"):
        store.create_endpoint(AdapterName("acme", "base"), None, {}, actor="ann")
    assert store.endpoints() == []


def test_another_tenant_s_adapter_takes_a_share(store: Registry) -> None:
    name, target = AdapterName("beta", "chat"), Selector.parse("acme/support@v1")
    with pytest.raises(AdapterNotFound, match=r"^There is no adapter acme/support here\.$"):
        store.create_endpoint(name, target, {}, actor="ann")
    store.share(SUPPORT, "beta")
    assert store.create_endpoint(name, target, {}, actor="ann").target == target


def test_an_adapter_is_not_shared_with_its_own_tenant(store: Registry) -> None:
    with pytest.raises(InvalidName, match="acme/support is acme's own"):
        store.share(SUPPORT, "acme")
    assert store.shares() == []


def test_the_beginning_of_a_digest_is_kept_whole(store: Registry) -> None:
    digest = store.versions(SUPPORT)[0].digest
    target = parse_target(f"support@sha256:{digest[:8]}", "acme")
    assert store.create_endpoint(CHAT, target, {}, actor="ann").target == Selector(
        SUPPORT, digest=digest
    )
