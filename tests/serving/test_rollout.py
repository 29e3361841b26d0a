"""Promote and rollback while requests run: warmed, checked, then flipped, and never half."""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from registry.adapter import AdapterName, AdapterRef, Selector, Version
from registry.errors import StoreUnavailable
from registry.records import Event, KeyRecord, Rollout
from registry.store import Registry
from serving.tokens import Tokens
from tests.registry.making import adapter_config, make_adapter, make_base
from tests.serving.live import CHAT, NAME, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine

SUPPORT = CHAT | {"model": "acme/support"}


def label_now(live: Running, model: str = "acme/support") -> str:
    answer = live.post(CHAT | {"model": model, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-adapter"]


def seconds_until(condition: Callable[[], bool], limit: float = 5.0) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - began


def rollout(wardrobe: Wardrobe, name: AdapterName = NAME) -> Rollout | None:
    found = wardrobe.registry.rollouts(name)
    return found[-1] if found else None


def readiness(live: Running, *, with_key: bool = True) -> dict[str, Any]:
    with live.client() as client:
        if not with_key:
            client.headers.pop("authorization")
        return client.get("/health/ready").json()


def read_stream(live: Running, label: list[str], begun: threading.Event, texts: list[str]) -> None:
    with (
        live.client() as client,
        client.stream(
            "POST", "/v1/chat/completions", json=SUPPORT | {"stream": True, "max_tokens": 300}
        ) as answer,
    ):
        label.append(answer.headers["x-adapter"])
        text = ""
        for line in answer.iter_lines():
            begun.set()
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert chunk["model"] == label[0]
                text += chunk["choices"][0]["delta"].get("content", "")
        texts.append(text)


def test_running_streams_finish_on_the_old_version_and_new_requests_use_the_new_one(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    wardrobe.push()
    wardrobe.push(promote=False)
    with running(wardrobe, tokens, ScriptedEngine(step_seconds=0.005)) as live:
        assert label_now(live) == "acme/support@v1"
        streams: list[tuple[threading.Thread, list[str], list[str]]] = []
        for _ in range(4):
            label, begun, texts = list[str](), threading.Event(), list[str]()
            thread = threading.Thread(target=read_stream, args=(live, label, begun, texts))
            thread.start()
            assert begun.wait(5)
            streams.append((thread, label, texts))
        wardrobe.promote(2)
        assert seconds_until(lambda: label_now(live) == "acme/support@v2") < 1.0
        assert all(thread.is_alive() for thread, _, _ in streams), "they still stream"
        wardrobe.registry.rollback(NAME, reason="test", actor="test")
        assert seconds_until(lambda: label_now(live) == "acme/support@v1") < 1.0
        for thread, label, texts in streams:
            thread.join(20)
            assert label == ["acme/support@v1"]
            assert texts == [("acme/support@v1 " * 20)[:300]]
        said = rollout(wardrobe)
        assert said is not None
        assert (said.state, said.number) == ("live", 1)


@pytest.mark.parametrize("fault", ["unloadable", "not_finite"])
def test_a_failing_version_leaves_the_old_one_serving_and_says_so(
    wardrobe: Wardrobe, tokens: Tokens, fault: str
) -> None:
    wardrobe.push()
    digest = wardrobe.push(promote=False)
    engine = ScriptedEngine()
    getattr(engine, fault).add(digest)
    with running(wardrobe, tokens, engine) as live:
        wardrobe.promote(2)
        seconds_until(lambda: readiness(live)["failed_rollouts"] == 1)
        assert label_now(live) == "acme/support@v1"
        details = readiness(live)
        assert details["status"] == "ready"
        (failure,) = details["failures"]
        assert (failure["name"], failure["alias"], failure["version"]) == (
            "acme/support",
            "production",
            2,
        )
        assert "acme/support@v2" in failure["message"]
        assert "failures" not in readiness(live, with_key=False)
        said = rollout(wardrobe)
        assert said is not None
        assert (said.state, said.number, said.message) == ("failed", 2, failure["message"])
        wardrobe.registry.rollback(NAME, reason="test", actor="test")
        seconds_until(lambda: readiness(live)["failed_rollouts"] == 0)


def test_a_version_asked_for_by_number_that_cannot_load_is_an_error_and_never_the_base(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(unloadable={wardrobe.push()})
    with running(wardrobe, tokens, engine) as live:
        for stream in (False, True):
            answer = live.post(CHAT | {"model": "acme/support@v1", "stream": stream})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "adapter_load_failed"
            assert "retry-after" in answer.headers


def test_nobody_is_answered_by_a_version_before_it_is_warm(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    """The load lasts until some have been answered: who waited for it would wait for ever."""
    wardrobe.push()
    wardrobe.push(promote=False)
    begun, may_end = threading.Event(), threading.Event()

    class Loading(ScriptedEngine):
        async def warm(self, adapter: AdapterRef) -> None:
            while adapter.label.endswith("@v2") and not may_end.is_set():
                begun.set()
                await asyncio.sleep(0.01)
            await super().warm(adapter)

    with running(wardrobe, tokens, Loading()) as live:
        wardrobe.promote(2)
        assert begun.wait(30)
        assert [label_now(live) for _ in range(5)] == 5 * ["acme/support@v1"]
        may_end.set()
        seconds_until(lambda: label_now(live) == "acme/support@v2", limit=30)


def test_a_newer_move_overtakes_one_that_is_still_warming(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    wardrobe.push()
    for _ in range(3):
        wardrobe.push(promote=False)
    engine = ScriptedEngine()
    with running(wardrobe, tokens, engine) as live:
        for number, engine.load_seconds in ((2, 60.0), (3, 60.0), (4, 0.3)):
            wardrobe.promote(number)
            time.sleep(0.15)
        labels: list[str] = []
        seconds_until(lambda: labels.append(label_now(live)) or labels[-1].endswith("@v4"))
        time.sleep(0.5)
        assert label_now(live) == "acme/support@v4"
        assert set(labels) == {"acme/support@v1", "acme/support@v4"}


def test_many_aliases_roll_out_side_by_side(wardrobe: Wardrobe, tokens: Tokens) -> None:
    names = [AdapterName("acme", f"line-{i}") for i in range(12)]
    with running(wardrobe, tokens, ScriptedEngine(load_seconds=0.4)) as live:
        for name in names:
            wardrobe.push(name)

        def all_live() -> bool:
            states = [rollout(wardrobe, name) for name in names]
            return all(state is not None and state.state == "live" for state in states)

        assert seconds_until(all_live) < 2.5
        assert {label_now(live, str(name)) for name in names} == {f"{name}@v1" for name in names}


def test_a_first_promote_can_be_asked_for_at_once(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens, ScriptedEngine(load_seconds=0.2)) as live:
        assert live.post(SUPPORT).status_code == 404
        wardrobe.push()
        assert label_now(live) == "acme/support@v1"


def test_a_first_version_that_fails_is_an_error_that_says_why(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    digest = wardrobe.push(promote=False)
    with running(wardrobe, tokens, ScriptedEngine(unloadable={digest})) as live:
        wardrobe.promote(1)
        answer = live.post(SUPPORT)
        assert answer.status_code == 503
        assert "the script says so" in answer.json()["error"]["message"]


def test_a_hundred_moves_under_load_fail_no_request_and_mix_no_answer(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    wardrobe.push()
    wardrobe.push(promote=False)
    stop = threading.Event()
    wrong: list[str] = []
    asked = [0]

    def ask(live: Running) -> None:
        with live.client() as client:
            while not stop.is_set():
                answer = client.post("/v1/chat/completions", json=SUPPORT | {"max_tokens": 30})
                label = answer.headers.get("x-adapter", "")
                asked[0] += 1
                if answer.status_code != 200:
                    wrong.append(answer.text)
                elif answer.json()["choices"][0]["message"]["content"] != (f"{label} " * 2)[:30]:
                    wrong.append(f"{label}: {answer.text}")

    with running(wardrobe, tokens) as live:
        threads = [threading.Thread(target=ask, args=(live,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for move in range(100):
            wardrobe.promote(1 + (move + 1) % 2)
            time.sleep(0.01)
        stop.set()
        for thread in threads:
            thread.join(10)
    assert wrong == []
    assert asked[0] > 100


R = TypeVar("R", bound=Registry)


@contextmanager
def running_on(kind: type[R], wardrobe: Wardrobe, tokens: Tokens) -> Iterator[tuple[R, Running]]:
    """Serve the wardrobe's store through a registry of this kind."""
    with kind.open(wardrobe.registry.home, wardrobe.registry.bases) as registry:
        assert isinstance(registry, kind)
        with running(Wardrobe(registry, wardrobe.base, wardrobe.folder), tokens) as live:
            yield registry, live


class LosableRegistry(Registry):
    """A registry whose database can go away under the server."""

    lost = False

    def _check(self) -> None:
        if self.lost:
            raise StoreUnavailable("the database is gone")

    def resolve(self, selector: Selector) -> Version:
        self._check()
        return super().resolve(selector)

    def revision(self) -> int | None:
        self._check()
        return super().revision()

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        self._check()
        return super().events(after, limit)

    def find_key(self, key_id: str) -> KeyRecord | None:
        self._check()
        return super().find_key(key_id)

    def heartbeat(self, server_id: str, url: str) -> None:
        self._check()
        super().heartbeat(server_id, url)


def test_a_lost_database_leaves_known_aliases_serving(wardrobe: Wardrobe, tokens: Tokens) -> None:
    wardrobe.push()
    wardrobe.push(promote=False)
    with running_on(LosableRegistry, wardrobe, tokens) as (registry, live):
        assert "x-registry-stale" not in live.post(SUPPORT).headers
        registry.lost = True
        time.sleep(1.2)
        for model in ("acme/support", "base"):
            answer = live.post(CHAT | {"model": model, "max_tokens": 1})
            assert answer.status_code == 200
            assert answer.headers["x-registry-stale"] == "1"
        assert readiness(live)["registry_stale"] is True
        cold = live.post(CHAT | {"model": "acme/support@v2"})
        assert cold.status_code == 503
        assert "retry-after" in cold.headers
        wardrobe.promote(2)
        registry.lost = False
        assert seconds_until(lambda: label_now(live) == "acme/support@v2") < 1.0
        assert readiness(live)["registry_stale"] is False


class CountingRegistry(Registry):
    """Counts how often its events are read."""

    reads = 0

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        self.reads += 1
        return super().events(after, limit)


def test_a_registry_that_nobody_writes_is_hardly_read(wardrobe: Wardrobe, tokens: Tokens) -> None:
    """A server looks ten times a second; it reads after its own sign of life, once a second."""
    wardrobe.push()
    wardrobe.push(promote=False)
    with running_on(CountingRegistry, wardrobe, tokens) as (registry, live):
        time.sleep(0.2)
        before = registry.reads
        time.sleep(2.0)
        assert registry.reads - before <= 6
        assert readiness(live)["registry_stale"] is False
        wardrobe.promote(2)
        assert seconds_until(lambda: label_now(live) == "acme/support@v2") < 1.0


def test_many_reports_to_a_locked_database_hold_up_no_request(
    wardrobe: Wardrobe, tokens: Tokens, tmp_path: Path
) -> None:
    names = [AdapterName("acme", f"a{number}") for number in range(40)]
    for name in names:
        wardrobe.push(name, promote=False)
    longest = 0.0
    with running(wardrobe, tokens, ScriptedEngine(load_seconds=1.5)) as live:
        for name in names:
            wardrobe.promote(1, name)
        lock = sqlite3.connect(tmp_path / "home" / "registry.sqlite", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        until = time.monotonic() + 6.0
        while time.monotonic() < until:  # long enough that keys are looked up again
            began = time.monotonic()
            assert live.post(CHAT | {"max_tokens": 1}).status_code == 200
            longest = max(longest, time.monotonic() - began)
        lock.execute("ROLLBACK")
        lock.close()
        seconds_until(lambda: len(live.services.live.versions) == len(names))
    assert longest < 3.0, "whom a report holds up waits for the rest of the lock"


def test_an_alias_that_moves_to_another_base_is_refused_as_after_a_restart(
    wardrobe: Wardrobe, tokens: Tokens, tmp_path: Path
) -> None:
    wardrobe.push()
    other = make_base(tmp_path / "other")
    wardrobe.registry.bases.add("acme/other-base", other, origin="test")
    config = adapter_config() | {"base_model_name_or_path": "acme/other-base"}
    moved = make_adapter(tmp_path / "moved", seed=99, config=config)
    wardrobe.registry.push(moved, NAME, base="acme/other-base", actor="test")
    with running(wardrobe, tokens) as live:
        assert label_now(live) == "acme/support@v1"
        wardrobe.promote(2)
        seconds_until(lambda: live.post(SUPPORT).status_code == 422)
        assert live.post(SUPPORT).json()["error"]["code"] == "base_mismatch"
        wardrobe.promote(1)
        seconds_until(lambda: live.post(SUPPORT).status_code == 200)
