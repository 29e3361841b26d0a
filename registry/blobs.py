"""Content-addressed bytes: a blob is named by its sha256, written once and checked on every read.

The acknowledge order: write to tmp/, fsync, rename, fsync the directories; only then does `put`
return. A crash before that leaves a file in tmp/ or a blob that no version names.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore

from registry.durable import sync
from registry.errors import IntegrityError, StoreUnavailable

if TYPE_CHECKING:
    from obstore import ObjectMeta  # a type that is not there when the program runs

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TMP = "tmp"


def blob_key(digest: str) -> str:
    """Return the path of a blob in its store: the only place where a digest becomes a path."""
    if not _DIGEST.fullmatch(digest):
        raise IntegrityError(f"{digest[:80]!r} is not a sha256 digest of 64 hex digits.")
    return f"{digest[:2]}/{digest}"


class Blobs:
    """Blobs in one object store. Safe for threads and for several processes."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        # An object store in the cloud is durable when it answers; a local file only after fsync.
        self._local = Path(str(store.prefix)) if isinstance(store, LocalStore) else None

    @classmethod
    def in_folder(cls, folder: Path) -> "Blobs":
        folder.mkdir(parents=True, exist_ok=True)
        return cls(LocalStore(folder))

    def put(self, source: Path, digest: str) -> None:
        """Store a file whose sha256 is `digest`; durable when this returns. Idempotent.

        Nobody may write to the file any more: where it can be it becomes the blob, without a copy.
        """
        key = blob_key(digest)
        with self._explained(digest):
            if not self._has(key) or self._hash(key) != digest:
                # A blob that is there with other bytes was damaged: these bytes replace it.
                tmp = f"{_TMP}/{secrets.token_hex(16)}"
                self._write(source, tmp)
                self._sync(tmp)
                obstore.rename(self._store, tmp, key)
            # Also for a blob that was there: its writer may have died before this point.
            self._sync(key)

    def copy(self, digest: str, target: Path) -> None:
        """Write a blob to a new file. Raises IntegrityError unless its bytes are the right ones."""
        found = hashlib.sha256()
        with self._explained(digest), target.open("xb") as file:
            for chunk in obstore.get(self._store, blob_key(digest)).stream(min_chunk_size=4 << 20):
                found.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if found.hexdigest() != digest:
            raise damaged(digest, found.hexdigest())

    def place(self, digest: str, target: Path, *, look: bool = True) -> None:
        """Give a blob a second name, for a reader: nothing is written that could be half there.

        Copies it where the store is no folder of this file system. Raises IntegrityError unless
        its bytes are the right ones; who does not `look` finds that out by itself.
        """
        if not self._link(digest, target):
            self.copy(digest, target)
            return
        if not look:
            return
        with self._explained(digest), target.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise damaged(digest, found)

    def check(self, digest: str) -> int:
        """Hash a stored blob and return its size. Raises IntegrityError when it is damaged."""
        key = blob_key(digest)
        with self._explained(digest):
            found = self._hash(key)
            size = obstore.head(self._store, key)["size"]
        if found != digest:
            raise damaged(digest, found)
        return size

    def sizes(self) -> dict[str, int]:
        """Return digest → size of every blob in the store."""
        with self._explained("of the list"):
            names = {meta["path"].rpartition("/")[2]: meta for meta in self._list()}
        return {
            name: meta["size"]
            for name, meta in names.items()
            if _DIGEST.fullmatch(name) and meta["path"] == blob_key(name)
        }

    def unfinished(self) -> list[Path]:
        """Return the files of puts that run now, or that died; obstore lists the large ones not."""
        return list((self._local / _TMP).glob("*")) if self._local else []

    def _write(self, source: Path, key: str) -> None:
        if self._local is not None:
            target = self._local / key
            target.parent.mkdir(exist_ok=True)
            if _linked(source, target):
                return
        obstore.put(self._store, key, source)

    @contextmanager
    def _explained(self, digest: str) -> Generator[None, None, None]:
        """Turn the errors of the store into ours, without where it is: a tenant may hear them."""
        try:
            yield
        except FileNotFoundError as error:
            raise IntegrityError(
                f"The blob {digest} is missing. Push the adapter again, or restore a backup."
            ) from error
        except (BaseError, OSError) as error:
            reason = str(error).partition("\n")[0]  # behind that come the insides of obstore
            if self._local:
                reason = reason.replace(str(self._local.parent), "the store")
            text = f"The blob {digest} cannot be read or written: {reason}."
            raise StoreUnavailable(text) from error

    def _link(self, digest: str, target: Path) -> bool:
        return self._local is not None and _linked(self._local / blob_key(digest), target)

    def _list(self) -> "list[ObjectMeta]":
        # The overload that gives arrow tables has no types unless pyarrow is installed.
        pages = obstore.list(  # pyright: ignore[reportUnknownMemberType]
            self._store, return_arrow=False
        )
        return [meta for page in pages for meta in page]

    def _has(self, key: str) -> bool:
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True

    def _hash(self, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in obstore.get(self._store, key).stream(min_chunk_size=4 << 20):
            digest.update(chunk)
        return digest.hexdigest()

    def _sync(self, key: str) -> None:
        """Make a file durable, and its name in every directory up to the folder of the store."""
        if self._local is None:
            return
        path = self._local / key
        for part in (path, path.parent, self._local):
            sync(part)


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name. False on another file system, and where it is missing."""
    try:
        target.hardlink_to(source)
    except OSError:
        return False
    return True


def damaged(digest: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"The blob {digest} is damaged: its bytes hash to {found[:12]}…. "
        "Push the adapter again to replace it, or restore a backup."
    )
