"""Base models on this machine: a logical id, a folder of safetensors, and two fingerprints.

The *structure* fingerprint says whether an adapter fits (names and shapes of the tensors and the
architecture); the *weights* fingerprint says whether it was trained on these very weights.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from registry.architectures import TRANSPOSED, module_of, read_base_config
from registry.errors import BaseNotFound, Conflict, IntegrityError, InvalidName, StoreUnavailable
from registry.jsonfile import canonical, read_object
from registry.tensors import Tensor, read_chunks, read_folder, tensor_files

RECORD = "base.json"
MAX_RECORD_BYTES = 64 << 20
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that has been pulled."""

    id: str  # logical id, for example HuggingFaceTB/SmolLM2-135M-Instruct
    path: Path  # config.json, tokenizer files and *.safetensors in plain dtypes
    fingerprint: str  # sha256 hex over every tensor's name, dtype, shape and bytes
    structure: str  # sha256 hex over every tensor's name and shape, and the architecture
    linears: dict[str, tuple[int, int]]  # module name → (out_features, in_features)
    origin: str = ""  # where the weights came from, for people


class Bases:
    """The base models in one folder. Safe for several processes; nothing is cached here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> list[BaseModel]:
        """Return every base model, by id. A folder without its record is one still being made."""
        folders = [path.parent for path in self.folder.glob(f"[!.]*/{RECORD}")]
        return sorted((_read_record(folder) for folder in folders), key=lambda base: base.id)

    def get(self, base_id: str) -> BaseModel:
        """Return one base model without hashing its weights again. Raises BaseNotFound."""
        folder = self.folder / _slug(base_id)
        if not (folder / RECORD).is_file():
            raise BaseNotFound(
                f"The base model {base_id!r} is not on this machine.",
                command=f"Fetch it with: wardrobe base pull {base_id}",
            )
        return _read_record(folder)

    def add(self, base_id: str, prepared: Path, *, origin: str) -> BaseModel:
        """Fingerprint the prepared folder and move it in; it is gone from where it was.

        Idempotent for the same weights; the same id with other weights raises Conflict.
        """
        target = self.folder / _slug(base_id)
        record = _describe(base_id, prepared, origin)
        if (target / RECORD).is_file():
            return self._same_or_conflict(record, target, prepared)
        _write_durably(prepared / RECORD, canonical(record))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            _move(prepared, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise StoreUnavailable(f"Cannot move {prepared} to {target}: {error}.") from error
            # Another process moved the same base in between the check above and the move.
            return self._same_or_conflict(record, target, prepared)
        return _read_record(target)

    def _same_or_conflict(self, record: dict[str, Any], target: Path, prepared: Path) -> BaseModel:
        known = _read_record(target)
        if known.fingerprint != record["fingerprint"]:
            raise Conflict(
                f"The base model {known.id!r} is already here with other weights (fingerprint "
                f"{known.fingerprint[:12]}, the new one has {record['fingerprint'][:12]}). "
                f"Add it under another id, or delete {target} first."
            )
        shutil.rmtree(prepared)
        return known


def fingerprint_weights(tensors: dict[str, Tensor]) -> str:
    """Hash every tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # The shape and dtype fix the number of bytes that follow, so no two models collide.
        digest.update(canonical([name, tensor.dtype, list(tensor.shape)]) + b"\n")
        for chunk in read_chunks(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint_structure(tensors: dict[str, Tensor], architectures: list[str]) -> str:
    """Hash the architecture and every tensor's name and shape."""
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return hashlib.sha256(canonical({"architectures": architectures, "shapes": shapes})).hexdigest()


def linear_shapes(tensors: dict[str, Tensor], kind: str) -> dict[str, tuple[int, int]]:
    """Return module → (out, in) of every 2-D `*.weight`, embeddings left out; kind: model_type."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in sorted(tensors.items()):
        if name.endswith(".weight") and len(tensor.shape) == 2 and not _is_embedding(name):
            first, second = tensor.shape
            shape = (second, first) if kind in TRANSPOSED else (first, second)
            shapes[module_of(name, kind)] = shape
    return shapes


def _is_embedding(name: str) -> bool:
    module = name.split(".")[-2] if "." in name else name
    return "embed" in module or module in ("wte", "wpe")


def _slug(base_id: str) -> str:
    if not _ID.fullmatch(base_id) or "--" in base_id or ".." in base_id:
        raise InvalidName(
            f"{base_id!r} is not a base model id: write NAME or OWNER/NAME with letters, digits "
            "and . _ - (no -- and no ..), for example HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return base_id.replace("/", "--")


def _describe(base_id: str, folder: Path, origin: str) -> dict[str, Any]:
    tensors = read_folder(folder)
    config = read_base_config(folder)
    linears = linear_shapes(tensors, config.get("model_type", ""))
    architectures: list[str] = config.get("architectures") or []
    return {
        "format": 1,
        "id": base_id,
        "origin": origin,
        "added_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "fingerprint": fingerprint_weights(tensors),
        "structure": fingerprint_structure(tensors, architectures),
        "files": {path.name: path.stat().st_size for path in tensor_files(folder)},
        "linears": {module: list(shape) for module, shape in linears.items()},
    }


def _read_record(folder: Path) -> BaseModel:
    record = read_object(folder / RECORD, MAX_RECORD_BYTES)
    for name, size in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise IntegrityError(
                f"{path} is not the file of {size} bytes that was added. Delete {folder} and "
                f"run: wardrobe base pull {record['id']}"
            )
    return BaseModel(
        id=record["id"],
        path=folder,
        fingerprint=record["fingerprint"],
        structure=record["structure"],
        linears={module: (out, into) for module, (out, into) in record["linears"].items()},
        origin=record["origin"],
    )


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _move(source: Path, target: Path) -> None:
    """Rename a folder in one step; across file systems copy it beside the target first."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        staging = target.with_name(f".tmp-{secrets.token_hex(8)}")
        shutil.copytree(source, staging)
        staging.rename(target)
        shutil.rmtree(source)
