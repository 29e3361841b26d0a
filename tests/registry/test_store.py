import errno
import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.adapter import AdapterName, AdapterRef, Selector
from registry.base import Bases
from registry.errors import (
    AdapterNotFound,
    AliasNotFound,
    Conflict,
    IntegrityError,
    NotFound,
    Refused,
    StoreUnavailable,
    VersionNotFound,
)
from registry.materialize import sha256_of
from registry.records import Push
from registry.store import Registry
from tests.registry.making import BASE_ID

Adapter = Callable[..., Path]
NAME = AdapterName.parse("acme/support")
PROMPT = {"prompt": {"system": "Answer briefly."}}
FAILED_GATE = {"gate": {"passed": False, "failures": ["accuracy 0.41 is under 0.60."]}}


def push(registry: Registry, folder: Path, name: AdapterName = NAME) -> Push:
    return registry.push(folder, name, actor="tester")


def promote(registry: Registry, number: int, **options: object):
    return registry.promote(NAME, number, reason="a test", actor="tester", **options)  # type: ignore[arg-type]


def rollback(registry: Registry):
    return registry.rollback(NAME, reason="a test", actor="tester")


def production(registry: Registry) -> int:
    return registry.resolve(Selector.parse("acme/support")).number


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
    with pytest.raises(AliasNotFound, match="wardrobe promote"):
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


def test_a_fetched_folder_is_made_once_and_checked_each_time(
    registry: Registry, adapter: Adapter
) -> None:
    made = adapter(card=PROMPT)
    ref = push(registry, made).version.ref
    folder = registry.fetch(ref)
    assert folder.name == ref.digest
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    before = folder.stat().st_ino
    assert registry.fetch(ref).stat().st_ino == before
    flip_a_bit(folder / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match=ref.digest):
        registry.fetch(ref)
    push(registry, made)
    shutil.rmtree(folder)
    registry.fetch(ref)


def test_a_fetched_folder_takes_no_second_copy_of_the_bytes(
    registry: Registry, adapter: Adapter
) -> None:
    version = push(registry, adapter()).version
    folder = registry.fetch(version.ref)
    for name, sha256 in version.files.items():
        blob = registry.home / "blobs" / sha256[:2] / sha256
        assert (folder / name).samefile(blob)


def test_a_store_on_another_file_system_is_copied(
    registry: Registry, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    version = push(registry, adapter()).version
    weights = registry.fetch(version.ref) / "adapter_model.safetensors"
    assert sha256_of(weights) == version.files[weights.name]


def test_fetching_an_unknown_digest_is_not_found(registry: Registry) -> None:
    for digest in ("0" * 64, "../../etc/passwd"):
        with pytest.raises(VersionNotFound):
            registry.fetch(AdapterRef(digest, "acme/support@v1"))


def test_threads_that_fetch_one_version_at_once_all_get_it(
    registry: Registry, adapter: Adapter
) -> None:
    ref = push(registry, adapter()).version.ref
    barrier, folders = threading.Barrier(8, timeout=30), []

    def fetch() -> None:
        barrier.wait()
        folders.append(registry.fetch(ref))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [folders[0]] * 8
    assert [path.name for path in (registry.home / "versions").iterdir()] == [ref.digest]


def test_a_flipped_bit_in_a_blob_is_found_by_fetch_and_verify_and_healed_by_a_push(
    registry: Registry, adapter: Adapter
) -> None:
    version = push(registry, adapter()).version
    sha256 = version.files["adapter_model.safetensors"]
    flip_a_bit(registry.home / "blobs" / sha256[:2] / sha256)
    with pytest.raises(IntegrityError, match=sha256):
        registry.fetch(version.ref)
    assert not (registry.home / "versions" / version.digest).exists()
    report = registry.verify()
    assert not report.ok
    assert sha256 in report.problems[0]
    assert not push(registry, adapter()).created
    assert registry.verify().ok
    registry.fetch(version.ref)


def test_a_missing_blob_is_found_by_verify(registry: Registry, adapter: Adapter) -> None:
    version = push(registry, adapter()).version
    sha256 = version.files["adapter_config.json"]
    (registry.home / "blobs" / sha256[:2] / sha256).unlink()
    assert "missing" in registry.verify().problems[0]
    with pytest.raises(IntegrityError, match="missing"):
        registry.fetch(version.ref)


def test_a_changed_row_is_found_by_fetch_and_verify(registry: Registry, adapter: Adapter) -> None:
    version = push(registry, adapter(card=PROMPT)).version
    with sqlite3.connect(registry.home / "registry.sqlite") as database:
        database.execute("UPDATE versions SET system_prompt = 'Obey me.'")
    database.close()
    with pytest.raises(IntegrityError, match="does not fit its digest"):
        registry.fetch(version.ref)
    with pytest.raises(IntegrityError, match="does not fit its digest"):
        registry.pull(Selector.parse("acme/support@v1"), registry.home / "pulled")
    assert "does not fit its digest" in registry.verify().problems[0]


def test_verify_lists_orphans_without_calling_them_problems_and_tells_its_progress(
    registry: Registry, adapter: Adapter
) -> None:
    push(registry, adapter())
    orphan = registry.home / "blobs" / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"left by a push that died")
    steps: list[tuple[int, int]] = []
    report = registry.verify(lambda done, total: steps.append((done, total)))
    assert report.ok
    assert report.orphans == (orphan.name,)
    assert report.versions == 1
    assert report.blobs == len(steps) == 2
    assert steps[-1] == (report.bytes, report.bytes)


def test_a_pulled_folder_can_be_pushed_again_and_is_the_same_version(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    folder = adapter(
        config={"base_model_name_or_path": "/home/me/base", "rank_pattern": {"q_proj": 4}},
        card={"base": {"id": BASE_ID}, "metrics": {"accuracy": 0.9}, **PROMPT},
    )
    (folder / "README.md").write_text("# Support\n")
    version = push(registry, folder).version
    pulled = tmp_path / "pulled"
    assert registry.pull(Selector.parse("acme/support@v1"), pulled) == version
    assert (pulled / "README.md").read_text() == "# Support\n"
    config = json.loads((pulled / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_ID
    again = push(registry, pulled)
    assert again.version == version
    assert again.warnings == ()
    with pytest.raises(Conflict, match="not empty"):
        registry.pull(Selector.parse("acme/support@v1"), pulled)


def test_a_pull_that_fails_leaves_no_file_behind(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    version, pulled = push(registry, adapter()).version, tmp_path / "pulled"
    sha256 = version.files["adapter_model.safetensors"]
    flip_a_bit(registry.home / "blobs" / sha256[:2] / sha256)
    with pytest.raises(IntegrityError, match="damaged"):
        registry.pull(Selector.parse("acme/support@v1"), pulled)
    assert list(pulled.iterdir()) == []
    push(registry, adapter())
    registry.pull(Selector.parse("acme/support@v1"), pulled)
    assert len(list(pulled.iterdir())) == 2


def test_a_pull_to_where_no_folder_can_be_is_said_so(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    push(registry, adapter())
    (tmp_path / "file").write_text("")
    for destination in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreUnavailable, match="Cannot write"):
            registry.pull(Selector.parse("acme/support@v1"), destination)


def test_verify_goes_on_after_a_blob_that_cannot_be_read(
    registry: Registry, adapter: Adapter
) -> None:
    for sha256 in push(registry, adapter()).version.files.values():
        blob = registry.home / "blobs" / sha256[:2] / sha256
        blob.unlink()
        blob.mkdir()
    assert len(registry.verify().problems) == 2


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


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
