"""Files that do not belong into an adapter are refused, and what is checked is the copy."""

import errno
import os
import pickle
import shutil
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from registry.adapter import AdapterName, Version
from registry.base import Bases
from registry.errors import Refused, StoreUnavailable
from registry.store import Registry
from registry.upload import IncomingFile, check_files, copy_upload, uploaded
from registry.validate import validate
from tests.registry.gate import GOOD, WEIGHTS, Adapter, gate, refused
from tests.registry.making import adapter_tensors
from tests.registry.stored import NAME


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("adapter_model.bin", "pickle_refused"),
        ("optimizer.pt", "pickle_refused"),
        ("weights.GGUF", "pickle_refused"),
        ("archive.zip", "pickle_refused"),
        ("train.py", "file_not_allowed"),
        ("tokenizer.json", "file_unexpected"),
        (".hidden", "file_not_allowed"),
        ("README.MD", "file_not_allowed"),
        ("a\nb", "file_not_allowed"),
    ],
)
def test_other_files_are_refused_by_name(
    adapter: Adapter, bases: Bases, tmp_path: Path, name: str, code: str
) -> None:
    folder = adapter()
    (folder / name).write_bytes(b"anything")
    assert refused(folder, bases, tmp_path) == {code}


def test_links_folders_and_pipes_are_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter()
    (tmp_path / "secret").write_text("{}")
    (folder / "wardrobe.json").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "README.md")
    (folder / "checkpoint-1").mkdir()
    assert refused(folder, bases, tmp_path) == {"not_a_regular_file", "file_not_allowed"}


def test_a_zip_named_safetensors_is_refused(adapter: Adapter, bases: Bases, tmp_path: Path) -> None:
    folder = adapter()
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(1))
    assert refused(folder, bases, tmp_path) == {"pickle_refused"}


def test_too_large_files_are_refused_before_they_are_read(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={})
    for name, size in (("wardrobe.json", 1 << 21), ("README.md", 1 << 21), (WEIGHTS, 3 << 30)):
        (folder / name).touch()
        os.truncate(folder / name, size)  # a sparse file: no byte is written
    with pytest.raises(Refused) as error:
        gate(folder, bases, tmp_path)
    assert [code for code, _ in error.value.problems] == ["too_large"] * 3


def test_both_adapter_files_are_needed(bases: Bases, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused) as error:
        gate(tmp_path / "empty", bases, tmp_path)
    assert [code for code, _ in error.value.problems] == ["file_missing"] * 2


def test_a_file_is_checked_in_the_copy_not_in_the_source(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    """Whoever changes the source after it was checked changes nothing that is stored."""
    folder, staging = adapter(), tmp_path / "staging"
    staging.mkdir()
    files = copy_upload(folder, staging)
    save_file(adapter_tensors(9), folder / WEIGHTS)
    validate(staging, bases)
    assert (staging / WEIGHTS).read_bytes() == GOOD
    assert files[WEIGHTS].size == len(GOOD)


def test_staged_files_become_the_blobs_without_a_copy(adapter: Adapter, registry: Registry) -> None:
    source = adapter()
    with registry.staging() as staging:
        shutil.copytree(source, staging, dirs_exist_ok=True)
        staged = (staging / "adapter_model.safetensors").stat().st_ino
        files = [uploaded(path) for path in staging.iterdir()]
        version = registry.push_staged(staging, files, NAME, actor="test").version
    sha256 = version.files["adapter_model.safetensors"]
    assert (registry.home / "blobs" / sha256[:2] / sha256).stat().st_ino == staged
    assert registry.verify().ok
    assert not registry.push(source, NAME, actor="test").created


def test_staged_files_pass_the_checks_of_a_push(adapter: Adapter, registry: Registry) -> None:
    with registry.staging() as staging:
        shutil.copytree(adapter(), staging, dirs_exist_ok=True)
        (staging / "pytorch_model.bin").write_bytes(b"")
        files = [uploaded(path) for path in staging.iterdir()]
        with pytest.raises(Refused, match=r"pytorch_model\.bin"):
            registry.push_staged(staging, files, NAME, actor="test")
        (staging / "pytorch_model.bin").unlink()
        (staging / "adapter_model.safetensors").write_bytes(b"PK\x03\x04")
        files = [uploaded(path) for path in staging.glob("adapter_*")]
        with pytest.raises(Refused, match="a zip"):
            registry.push_staged(staging, files, NAME, actor="test")


def test_what_passed_the_gate_is_told_before_it_is_a_version(
    adapter: Adapter, registry: Registry
) -> None:
    told: list[tuple[str, list[AdapterName]]] = []

    def passed(version: Version) -> None:
        told.append((version.digest, registry.adapters()))

    with registry.staging() as staging:
        files = list(copy_upload(adapter(config={"r": 7}), staging).values())
        with pytest.raises(Refused):
            registry.push_staged(staging, files, NAME, actor="test", passed=passed)
    assert told == []
    with registry.staging() as staging:
        files = list(copy_upload(adapter(), staging).values())
        pushed = registry.push_staged(staging, files, NAME, actor="test", passed=passed)
    assert told == [(pushed.version.digest, [])]


def test_a_disk_that_fails_beside_the_gate_fails_the_push(
    adapter: Adapter, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells an error once: what is written later may go well."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("registry.gate.sync", fail)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            registry.push(adapter(), NAME, actor="test")
    assert registry.adapters() == []
    assert list((registry.home / "staging").iterdir()) == []
    assert registry.push(adapter(), NAME, actor="test").created


def test_a_file_that_comes_in_pieces_is_hashed_and_bounded_on_the_way(tmp_path: Path) -> None:
    with closing(IncomingFile(tmp_path, "README.md")) as file:
        file.write([b"# Sup", b"port\n"])
        assert file.close() == uploaded(tmp_path / "README.md")
    with closing(IncomingFile(tmp_path, "wardrobe.json")) as file:
        file.write([b" " * (1 << 20)])
        with pytest.raises(Refused, match=r"wardrobe\.json is over 1048576 bytes"):
            file.write([b" "])
    assert (tmp_path / "wardrobe.json").stat().st_size == 1 << 20
    for name in ("../README.md", "", "adapter_model.bin"):
        with pytest.raises(Refused):
            IncomingFile(tmp_path / "staging", name)


def test_the_first_bytes_are_checked_in_the_copy_too(
    adapter: Adapter, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README becomes a pickle after the folder was looked through."""
    folder = adapter()
    (folder / "README.md").write_text("# Support")

    def look_and_swap(source: Path) -> list[tuple[str, str]]:
        problems = check_files(source)
        (source / "README.md").write_bytes(pickle.dumps(1))
        return problems

    monkeypatch.setattr("registry.upload.check_files", look_and_swap)
    assert refused(folder, bases, tmp_path) == {"pickle_refused"}
