"""Folders made of blobs, and their bytes: what the engine reads, and what people pull."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.adapter import Version
from registry.blobs import Blobs, damaged
from registry.card import CARD_NAME
from registry.contents import CONFIG_NAME, WEIGHTS_NAME, identity_files
from registry.errors import Conflict, IntegrityError, StoreUnavailable
from registry.manifest import digest_of


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The bytes of an adapter's two files. They are the right ones when `check` has said nothing.

    It hashes these very bytes, so it may do that beside whoever makes something of them.
    """

    version: Version
    data: Mapping[str, bytes]
    folder: Path  # where they came from
    staging: Path | None  # or where, if nobody has looked at them yet; then they go to `folder`

    @property
    def config(self) -> bytes:
        return self.data[CONFIG_NAME]

    @property
    def weights(self) -> bytes:
        return self.data[WEIGHTS_NAME]

    def check(self) -> None:
        """Call it once. Raises IntegrityError, and then it made no folder."""
        try:
            for name, data in self.data.items():
                self._check(name, hashlib.sha256(data).hexdigest())
            if self.staging:
                _publish(self.staging, self.folder)
        finally:
            if self.staging:
                shutil.rmtree(self.staging, ignore_errors=True)

    def _check(self, name: str, found: str) -> None:
        wanted = self.version.files[name]
        if found != wanted and self.staging:
            raise damaged(wanted, found)
        if found != wanted:
            raise _strange(self.folder / name, self.version)


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """An adapter's two files, unread and unchecked: they say how much memory they will take."""

    version: Version
    folder: Path  # where they are
    staging: Path | None  # or where, if nobody has looked at them yet

    @property
    def place(self) -> Path:
        return self.staging or self.folder

    def read(self) -> StoredFiles:
        """Return their bytes, with their check. Raises IntegrityError where one is missing.

        Of staged ones that may be the sweep of another process: find them again then.
        """
        try:
            if self.staging:
                os.utime(self.staging)  # nobody sweeps it while they are read and checked
            names = identity_files(self.version.files)
            data = {name: (self.place / name).read_bytes() for name in names}
        except FileNotFoundError as error:
            self.give_up()
            missing = error.filename or self.place / CONFIG_NAME  # `utime` names no file
            raise _strange(Path(missing), self.version) from error
        return StoredFiles(self.version, data, self.folder, self.staging)

    def give_up(self) -> None:
        """Call it when nobody will read them."""
        if self.staging:
            shutil.rmtree(self.staging, ignore_errors=True)


def find_files(version: Version, blobs: Blobs, parent: Path) -> FoundFiles:
    """Return where the adapter's files are, as `materialize` has them but for its check."""
    _check_record(version)
    folder = parent / version.digest
    staging = None if folder.exists() else _stage(version, blobs, folder, look=False)
    return FoundFiles(version, folder, staging)


def materialize(version: Version, blobs: Blobs, parent: Path) -> Path:
    """Return `parent/<digest>` with the two files of the adapter, made once and checked each time.

    The files are the blobs themselves under other names where that can be: a first request for an
    adapter waits for no disk, and the bytes are there once.
    Safe across threads and processes: the folder appears in one rename, the first one wins.
    """
    _check_record(version)
    folder = parent / version.digest
    if folder.exists():
        for name in identity_files(version.files):
            _check(folder / name, version)
    else:
        _make(version, blobs, folder)  # which has looked at the bytes
    return folder


def export(version: Version, blobs: Blobs, destination: Path, beside: Sequence[Path] = ()) -> None:
    """Write a version to a new folder that PEFT loads and that can be pushed again.

    `beside` are files of the base that go with it.
    The files get their places when all of them are written and checked.
    """
    _check_record(version)
    partial = destination / ".partial"
    try:
        if destination.exists() and any(destination.iterdir()):
            text = f"{destination} is not empty. Give a folder that is empty or not there yet."
            raise Conflict(text)
        partial.mkdir(parents=True)
        try:
            _write_all(version, blobs, partial)
            for path in beside:
                shutil.copyfile(path, partial / path.name)
            for path in list(partial.iterdir()):
                path.rename(destination / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise StoreUnavailable(f"Cannot write {destination}: {error}") from error


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_record(version: Version) -> None:
    if digest_of(version) != version.digest:
        raise IntegrityError(
            f"The record of {version.ref.label} does not fit its digest {version.digest}: "
            "the database was changed. Restore a backup."
        )


def _write_all(version: Version, blobs: Blobs, folder: Path) -> None:
    for name, sha256 in version.files.items():
        blobs.copy(sha256, folder / name)
    if version.card:
        text = json.dumps(version.card, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / CARD_NAME).write_text(text + "\n", encoding="utf-8")


def _make(version: Version, blobs: Blobs, folder: Path) -> None:
    staging = _stage(version, blobs, folder, look=True)
    try:
        _publish(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _stage(version: Version, blobs: Blobs, folder: Path, *, look: bool) -> Path:
    """Return a new folder with the files; who does not `look` has to before it is published."""
    staging = folder.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        staging.mkdir(parents=True)
        for name in identity_files(version.files):
            blobs.place(version.files[name], staging / name, look=look)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _not_written(folder, error) from error
        raise
    return staging


def _publish(staging: Path, folder: Path) -> None:
    try:
        staging.rename(folder)
    except OSError as error:
        # Another thread or process made the folder between our look and our rename: use theirs.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise _not_written(folder, error) from error


def _check(path: Path, version: Version) -> None:
    try:
        found = sha256_of(path)
    except FileNotFoundError:
        found = "nothing"
    if found != version.files[path.name]:
        raise _strange(path, version)


# Who asks for an adapter hears of these, and need not know where the store is.
def _strange(path: Path, version: Version) -> IntegrityError:
    place = Path(*path.parts[-3:])
    return IntegrityError(
        f"{place} in the store is not what {version.ref.label} (sha256:{version.digest}) consists "
        f"of. Push the adapter again and delete {place.parent} there: it is made again."
    )


def _not_written(folder: Path, error: OSError) -> StoreUnavailable:
    place = Path(*folder.parts[-2:])
    return StoreUnavailable(f"Cannot write {place} in the store: {error.strerror}.")
