"""Files of versions: fetched, pulled, verified, and healed by a push."""

import errno
import json
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from registry.adapter import AdapterRef, Selector
from registry.errors import (
    Conflict,
    IntegrityError,
    StoreUnavailable,
    VersionNotFound,
)
from registry.materialize import sha256_of
from registry.store import Registry
from tests.registry.making import BASE_ID
from tests.registry.stored import (
    PROMPT,
    Adapter,
    flip_a_bit,
    push,
)


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


def test_bytes_are_read_first_and_checked_beside_their_reader(
    registry: Registry, adapter: Adapter
) -> None:
    made = adapter()
    version = push(registry, made).version
    folder = registry.home / "versions" / version.digest
    files = registry.find_files(version.ref).read()
    assert files.weights == (made / "adapter_model.safetensors").read_bytes()
    assert not folder.exists(), "nobody has looked at them yet"
    files.check()
    assert folder == registry.fetch(version.ref)
    again = registry.find_files(version.ref).read()
    again.check()
    assert (again.config, again.weights) == (files.config, files.weights)
    flip_a_bit(folder / "adapter_model.safetensors")
    with pytest.raises(IntegrityError, match=version.digest):
        registry.find_files(version.ref).read().check()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=version.digest):
        registry.find_files(version.ref).read()
    assert [path.name for path in folder.parent.iterdir()] == [version.digest]


def test_staged_files_are_not_swept_while_they_are_read_and_checked(
    registry: Registry, adapter: Adapter
) -> None:
    version = push(registry, adapter()).version
    found = registry.find_files(version.ref)
    os.utime(found.place, (1, 1))
    files = found.read()
    Registry.open(registry.home, registry.bases).close()
    files.check()
    assert [path.name for path in (registry.home / "versions").iterdir()] == [version.digest]


def test_wrong_bytes_of_a_blob_make_no_folder(registry: Registry, adapter: Adapter) -> None:
    version = push(registry, adapter()).version
    sha256 = version.files["adapter_model.safetensors"]
    flip_a_bit(registry.home / "blobs" / sha256[:2] / sha256)
    with pytest.raises(IntegrityError, match=sha256):
        registry.find_files(version.ref).read().check()
    assert not list((registry.home / "versions").iterdir())


def test_two_that_read_one_version_for_the_first_time_both_get_it(
    registry: Registry, adapter: Adapter
) -> None:
    ref = push(registry, adapter()).version.ref
    both = [registry.find_files(ref).read() for _ in range(2)]
    for files in both:
        files.check()
    assert [path.name for path in (registry.home / "versions").iterdir()] == [ref.digest]


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


def test_what_is_said_of_files_that_cannot_be_read_tells_nobody_where_the_store_is(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    version = push(registry, adapter()).version
    blob = version.files["adapter_model.safetensors"]
    place, folders = registry.home / "blobs" / blob[:2] / blob, registry.home / "versions"

    def told() -> str:
        with pytest.raises((IntegrityError, StoreUnavailable)) as caught:
            registry.find_files(version.ref).read().check()
        assert str(registry.home) not in str(caught.value)
        return str(caught.value)

    folders.write_text("no folder")
    assert f"Cannot write versions/{version.digest} in the store: Not a directory." in told()
    folders.unlink()
    place.parent.rename(tmp_path / "aside")
    place.parent.write_text("no folder")
    assert f"The blob {blob} cannot be read or written: " in told()
    place.parent.unlink()
    (tmp_path / "aside").rename(place.parent)
    registry.find_files(version.ref).read().check()
    flip_a_bit(place)
    assert f"versions/{version.digest}/adapter_model.safetensors in the store is not" in told()


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
