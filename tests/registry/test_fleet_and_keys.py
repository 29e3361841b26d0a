import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.adapter import AdapterName
from registry.errors import Conflict, NotFound
from registry.fleet import FORGET_SECONDS, LIVE_SECONDS
from registry.follow import wait_for_rollouts
from registry.records import Alias, RolloutState
from registry.store import Registry

Adapter = Callable[..., Path]
NAME = AdapterName.parse("acme/support")
URL = "http://127.0.0.1:8000"


@pytest.fixture
def alias(registry: Registry, adapter: Adapter) -> Alias:
    registry.push(adapter(), NAME, actor="test")
    return registry.promote(NAME, 1, reason="test", actor="test").alias


def report(
    registry: Registry, server: str, alias: Alias, state: RolloutState, seq: int = 0
) -> None:
    registry.report_rollout(
        server,
        NAME,
        alias.alias,
        event_seq=alias.event_seq + seq,
        number=alias.number,
        digest=alias.digest,
        state=state,
        message="because",
        seconds=0.3,
    )


def age(registry: Registry, seconds: float) -> None:
    with sqlite3.connect(registry.home / "registry.sqlite") as database:
        database.execute("UPDATE servers SET seen_at = seen_at - ?", (seconds,))
    database.close()


def test_a_server_is_live_until_its_heartbeat_is_old(registry: Registry) -> None:
    registry.heartbeat("one", URL)
    registry.heartbeat("one", "http://127.0.0.1:9000")
    assert [server.url for server in registry.servers()] == ["http://127.0.0.1:9000"]
    age(registry, LIVE_SECONDS + 1)
    assert registry.servers() == []
    registry.heartbeat("one", URL)
    assert [server.server_id for server in registry.servers()] == ["one"]


def test_the_latest_report_of_each_live_server_counts(registry: Registry, alias: Alias) -> None:
    for server in ("one", "two"):
        registry.heartbeat(server, f"{URL}/{server}")
        report(registry, server, alias, "warming")
    report(registry, "two", alias, "failed")
    found = {rollout.server_id: rollout.state for rollout in registry.rollouts()}
    assert found == {"one": "warming", "two": "failed"}
    assert [rollout.message for rollout in registry.rollouts(NAME)] == ["because"] * 2
    assert registry.rollouts(AdapterName.parse("acme/other")) == []
    age(registry, LIVE_SECONDS + 1)
    assert registry.rollouts() == []


def test_a_server_that_ended_long_ago_is_forgotten(registry: Registry, alias: Alias) -> None:
    registry.heartbeat("old", URL)
    report(registry, "old", alias, "live")
    age(registry, FORGET_SECONDS + 1)
    registry.heartbeat("new", URL)
    registry.heartbeat("old", URL)
    assert {server.server_id for server in registry.servers()} == {"old", "new"}
    assert registry.rollouts() == []


def test_waiting_ends_when_every_live_server_has_settled(registry: Registry, alias: Alias) -> None:
    for server in ("one", "two"):
        registry.heartbeat(server, URL)
        report(registry, server, alias, "live")
    rollouts, silent = wait_for_rollouts(registry, alias, 5)
    assert {rollout.state for rollout in rollouts} == {"live"}
    assert len(rollouts) == 2
    assert silent == []


def test_waiting_names_the_servers_that_said_nothing_in_time(
    registry: Registry, alias: Alias
) -> None:
    for server in ("old", "warming", "quiet"):
        registry.heartbeat(server, URL)
    report(registry, "old", alias, "live", seq=-1)
    report(registry, "warming", alias, "warming")
    started = time.monotonic()
    rollouts, silent = wait_for_rollouts(registry, alias, 0.3)
    assert time.monotonic() - started >= 0.3
    assert rollouts == []
    assert {server.server_id for server in silent} == {"old", "warming", "quiet"}


def test_keys_are_added_found_listed_and_revoked_once(registry: Registry) -> None:
    key = registry.add_key("k1", "hash", "acme", ("admin", "infer"))
    assert registry.find_key("k1") == key
    assert registry.keys() == [key]
    assert key.revoked_at is None
    assert registry.find_key("k2") is None
    revoked = registry.revoke_key("k1")
    assert revoked.revoked_at
    assert registry.revoke_key("k1") == revoked
    assert registry.find_key("k1") == revoked
    with pytest.raises(Conflict, match="already a key"):
        registry.add_key("k1", "other", "acme", ())
    with pytest.raises(NotFound):
        registry.revoke_key("k2")
