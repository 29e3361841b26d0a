"""What is pushed is a version: found, numbered, told as an event, and there after a restart."""

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from registry.adapter import AdapterName, Selector
from registry.base import Bases
from registry.errors import (
    AdapterNotFound,
    AliasNotFound,
    Conflict,
    IntegrityError,
    NotFound,
    Refused,
    VersionNotFound,
)
from registry.store import Registry
from tests.registry.stored import NAME, PROMPT, Adapter, promote, push


def test_a_push_gives_the_next_number_and_is_found_by_every_selector(
    registry: Registry, adapter: Adapter
) -> None:
    first, second = push(registry, adapter()), push(registry, adapter(seed=1))
    assert (first.version.number, second.version.number) == (1, 2)
    assert first.created
    assert second.created
    digest = second.version.digest
    for text in ("acme/support@v2", f"acme/support@sha256:{digest}"):
        assert registry.resolve(Selector.parse(text)) == second.version
    assert registry.resolve(Selector.parse(f"acme/support@sha256:{digest[:8]}")).number == 2
    assert registry.adapters() == [NAME]
    assert [version.number for version in registry.versions(NAME)] == [1, 2]


def test_pushing_the_same_content_again_answers_with_the_existing_version(
    registry: Registry, adapter: Adapter
) -> None:
    first = push(registry, adapter())
    again = push(registry, adapter(config={"target_modules": ["q_proj", "up_proj"]}))
    assert again.version == first.version
    assert not again.created
    assert len(registry.events(0)) == 1


def test_metrics_are_not_identity_and_the_system_prompt_is(
    registry: Registry, adapter: Adapter
) -> None:
    first = push(registry, adapter())
    measured = push(registry, adapter(card={"metrics": {"accuracy": 0.9}}))
    assert not measured.created
    assert [code for code, _ in measured.warnings] == ["card_not_stored"]
    prompted = push(registry, adapter(card=PROMPT))
    assert prompted.created
    assert prompted.version.system_prompt == "Answer briefly."
    assert prompted.version.digest != first.version.digest


def test_the_same_content_under_two_names_has_one_digest_and_two_histories(
    registry: Registry, adapter: Adapter
) -> None:
    other = AdapterName.parse("globex/support")
    first, second = push(registry, adapter()), push(registry, adapter(), other)
    assert first.version.digest == second.version.digest
    assert second.created
    assert registry.fetch(first.version.ref) == registry.fetch(second.version.ref)


def test_a_refused_push_leaves_nothing_behind(registry: Registry, adapter: Adapter) -> None:
    with pytest.raises(Refused):
        push(registry, adapter(config={"r": 5}))
    assert registry.adapters() == []
    assert registry.verify().orphans == ()
    assert list((registry.home / "staging").iterdir()) == []


def test_a_missing_folder_is_said_so(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no folder"):
        push(registry, tmp_path / "nothing")


def test_what_does_not_exist_is_named_as_what_it_is(registry: Registry, adapter: Adapter) -> None:
    with pytest.raises(AdapterNotFound):
        registry.resolve(Selector.parse("acme/nobody@v1"))
    with pytest.raises(AdapterNotFound):
        registry.history(AdapterName.parse("acme/nobody"))
    push(registry, adapter())
    with pytest.raises(VersionNotFound):
        registry.resolve(Selector.parse("acme/support@v9"))
    with pytest.raises(VersionNotFound):
        registry.resolve(Selector.parse("acme/support@sha256:" + "0" * 64))
    with pytest.raises(AliasNotFound, match="has no alias"):
        registry.resolve(Selector.parse("acme/support"))
    with pytest.raises(VersionNotFound):
        promote(registry, 9)


def test_the_start_of_a_digest_that_fits_two_versions_is_refused(
    registry: Registry, adapter: Adapter
) -> None:
    push(registry, adapter())
    push(registry, adapter(seed=1))
    with sqlite3.connect(registry.home / "registry.sqlite") as database:
        for number in (1, 2):
            digest = "abcdef0123" + str(number) * 54
            database.execute("UPDATE versions SET digest = ? WHERE number = ?", (digest, number))
    database.close()
    with pytest.raises(Conflict, match="several versions"):
        registry.resolve(Selector.parse("acme/support@sha256:abcdef0123"))
    assert registry.resolve(Selector.parse("acme/support@sha256:abcdef01232")).number == 2


def test_events_are_numbered_without_gaps_and_read_in_pages(
    registry: Registry, adapter: Adapter
) -> None:
    assert registry.last_event() == 0
    for seed in range(3):
        push(registry, adapter(seed=seed))
    promote(registry, 2)
    assert [event.seq for event in registry.events(0)] == [1, 2, 3, 4]
    assert [event.seq for event in registry.events(1, limit=2)] == [2, 3]
    assert registry.events(4) == []
    assert registry.last_event() == 4


def test_a_store_opens_and_answers_while_another_process_writes(
    registry: Registry, adapter: Adapter, bases: Bases
) -> None:
    push(registry, adapter())
    writer = sqlite3.connect(registry.home / "registry.sqlite")
    writer.execute("BEGIN IMMEDIATE")
    with Registry.open(registry.home, bases) as other:
        assert other.adapters() == [NAME]
    writer.close()


def test_a_store_survives_being_closed_and_opened(
    registry: Registry, adapter: Adapter, bases: Bases
) -> None:
    version = push(registry, adapter()).version
    promote(registry, 1)
    registry.close()
    with Registry.open(registry.home, bases) as reopened:
        assert reopened.resolve(Selector.parse("acme/support")) == version
        assert reopened.verify().ok


def test_a_database_that_is_none_is_refused_in_clear_words(tmp_path: Path, bases: Bases) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "registry.sqlite").write_bytes(b"not a database, " * 512)
    with pytest.raises(IntegrityError, match="damaged"):
        Registry.open(tmp_path / "home", bases)


def test_opening_sweeps_old_leftovers_and_spares_what_is_new(
    registry: Registry, bases: Bases
) -> None:
    old, new = registry.home / "staging" / "old", registry.home / "staging" / "new"
    old_tmp, new_tmp = registry.home / "blobs/tmp/old", registry.home / "blobs/tmp/new"
    large = registry.home / "blobs/tmp/ab12#1"  # as obstore names what it uploads in parts
    for folder in (old, new, old_tmp.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (old_tmp, new_tmp, large):
        path.write_bytes(b"half a blob")
    for path in (old, old_tmp, large):
        os.utime(path, (1, 1))
    registry.close()
    Registry.open(registry.home, bases).close()
    assert not old.exists()
    assert not old_tmp.exists()
    assert not large.exists()
    assert new.exists()
    assert new_tmp.exists()


def test_many_threads_push_different_content_and_every_number_is_given_once(
    registry: Registry, adapter: Adapter
) -> None:
    folders = [adapter(seed=seed) for seed in range(12)]
    barrier, numbers = threading.Barrier(12, timeout=30), []

    def run(folder: Path) -> None:
        barrier.wait()
        numbers.append(push(registry, folder).version.number)

    threads = [threading.Thread(target=run, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 13))
