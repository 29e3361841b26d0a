"""The files of a push: which may come in, and a private copy that nobody can change meanwhile."""

import hashlib
import os
import stat
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from registry.contents import COMPANIONS, CONFIG_NAME, MODEL_NAME, WEIGHTS_NAME
from registry.errors import NotFound, Problem, Refused, refused

MAX_FILES = 1000

# name → the most bytes it may have
ALLOWED = {
    CONFIG_NAME: 4 << 20,
    WEIGHTS_NAME: 2 << 30,
    "wardrobe.json": 1 << 20,
    "README.md": 1 << 20,
    MODEL_NAME: 16 << 30,
    **COMPANIONS,
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".zip", ".gguf")
# First bytes of formats that run code when they are opened, or that hide other files.
_MAGIC = {
    b"PK\x03\x04": "a zip or torch.save file",
    b"\x7fELF": "a program",
    b"\x1f\x8b": "a gzip file",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a numpy file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """One file in the private copy."""

    path: Path
    sha256: str
    size: int


class IncomingFile:
    """A file that is being written into the private copy: bounded, and hashed on the way.

    Close it, whatever happens.
    """

    def __init__(self, staging: Path, name: str) -> None:
        """Make the file. Raises Refused for a name that is not taken, and FileExistsError."""
        if problems := check_name(name):
            raise Refused.because(problems)
        self.path, self._limit = staging / name, ALLOWED[name]
        self._size, self._digest = 0, hashlib.sha256()
        self._file = self.path.open("xb")

    def write(self, pieces: Iterable[bytes]) -> None:
        """Raises Refused for a file that becomes too large."""
        for piece in pieces:
            self._size += len(piece)
            if self._size > self._limit:
                text = f"{self.path.name} is over {self._limit} bytes."
                raise refused("too_large", text)
            self._digest.update(piece)
            self._file.write(piece)

    def close(self) -> UploadedFile:
        """Return what was written up to now."""
        self._file.close()
        return UploadedFile(self.path, self._digest.hexdigest(), self._size)


def copy_upload(source: Path, staging: Path) -> dict[str, UploadedFile]:
    """Copy the allowed files of `source` into `staging`, hashing them on the way.

    Raises NotFound when there is no such folder and Refused when anything else lies in it.
    """
    if not source.is_dir():
        raise NotFound(f"There is no folder {source}. Give the one that holds the version's files.")
    _require_files(source)
    # Checked in the copy, which is what will be stored: the source may change at any time.
    return _checked(_copy(source / name, staging) for name in ALLOWED if (source / name).exists())


def check_upload(staging: Path, files: Iterable[UploadedFile]) -> dict[str, UploadedFile]:
    """Return all files of a folder that nobody else can write to, by name. Raises Refused."""
    _require_files(staging)
    return _checked(files)


def uploaded(path: Path) -> UploadedFile:
    """Describe a file that is in the private copy already."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return UploadedFile(path, digest, path.stat().st_size)


def _require_files(folder: Path) -> None:
    if problems := check_files(folder):
        raise Refused.because(problems)


def _checked(files: Iterable[UploadedFile]) -> dict[str, UploadedFile]:
    found = {file.path.name: file for file in files}
    if problems := [problem for file in found.values() for problem in _check_head(file.path)]:
        raise Refused.because(problems)
    return found


def check_files(source: Path) -> list[Problem]:
    """Return what is wrong with the names, kinds and sizes of the files."""
    with os.scandir(source) as listing:
        entries = [entry for entry, _ in zip(listing, range(MAX_FILES + 1), strict=False)]
    if len(entries) > MAX_FILES:
        return [("too_large", f"{source} holds more than {MAX_FILES} files.")]
    problems: list[Problem] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        problems += _check_entry(entry)
    return problems


def check_name(name: str) -> list[Problem]:
    """Return why a file of this name is not taken; empty when it is one of `ALLOWED`."""
    shown = repr(name[:100])
    if name.lower().endswith(_PICKLED):
        text = (
            f"{shown}: opening such a file may run code. Take it out; "
            "weights come as safetensors, which save_pretrained writes."
        )
        return [("pickle_refused", text)]
    if name not in ALLOWED:
        allowed = ", ".join(ALLOWED)
        return [("file_not_allowed", f"{shown} does not belong here. Allowed are {allowed}.")]
    return []


def _check_entry(entry: os.DirEntry[str]) -> list[Problem]:
    name = repr(entry.name[:100])
    if problems := check_name(entry.name):
        return problems
    if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
        return [("not_a_regular_file", f"{name} is a link or a special file.")]
    size, limit = entry.stat(follow_symlinks=False).st_size, ALLOWED[entry.name]
    if size > limit:
        return [("too_large", f"{name} has {size} bytes, the limit is {limit}.")]
    return []


def _check_head(path: Path) -> list[Problem]:
    with path.open("rb") as file:
        head = file.read(8)
    found = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    # A safetensors length whose low bytes look like a magic number is told apart by what follows.
    if found is None or (head[2:] == b"\0" * 6 and path.suffix == ".safetensors"):
        return []
    return [("pickle_refused", f"{path.name} is {found}: convert the adapter to safetensors.")]


def _copy(source: Path, staging: Path) -> UploadedFile:
    # O_NOFOLLOW and the check on the open file: the entry may have been swapped since it was seen.
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as reader:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refused("not_a_regular_file", f"{source} is not a regular file.")
        with closing(IncomingFile(staging, source.name)) as writer:
            writer.write(iter(partial(reader.read, _CHUNK), b""))
            return writer.close()
