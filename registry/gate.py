"""From the files of a push to what its version will be: checked, and on the disk."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from registry.adapter import AdapterName, Version
from registry.base import Bases
from registry.card import CARD_NAME, kind_of, system_prompt
from registry.contents import COMPANIONS, CONFIG_NAME, MODEL_NAME, WEIGHTS_NAME
from registry.convert import convert
from registry.database import now
from registry.durable import sync
from registry.errors import Problem
from registry.jsonfile import canonical
from registry.manifest import config_bytes, digest_of
from registry.text_half import keep_text
from registry.upload import UploadedFile, uploaded
from registry.validate import Checked, validate
from registry.vectors import AnyConfig


@dataclass(frozen=True)
class Passed:
    """What the gate let through."""

    version: Version  # it is none yet: its number is 0
    files: dict[str, UploadedFile]  # all of the version's, and the card
    warnings: tuple[Problem, ...]


def pass_gate(
    staging: Path,
    files: dict[str, UploadedFile],
    name: AdapterName,
    bases: Bases,
    base: str | None,
) -> Passed:
    """Convert what has to be, check it and describe it. Raises as `validate` does, and OSError.

    `files` are all of `staging`, which nobody else can write to.
    """
    files = dict(files)
    half = keep_text(staging, bases, base=base)
    told = [*filter(None, (half, convert(staging, bases, base=base)))]
    if told:
        files[WEIGHTS_NAME] = uploaded(staging / WEIGHTS_NAME)
    with ThreadPoolExecutor(1, "push-sync") as beside:
        # The gate needs the bytes, and not that the disk has them, which takes as long. What the
        # disk says counts: it tells an error once, and who stores them would not hear of it again.
        on_disk = beside.submit(_sync_all, list(files.values()))
        checked = validate(staging, bases, base=base)
        on_disk.result()
    if checked.config is not None:
        files[CONFIG_NAME] = _write_config(staging, checked.config)
    return Passed(_describe(name, checked, files), files, (*told, *checked.warnings))


def _sync_all(files: Iterable[UploadedFile]) -> None:
    for file in files:
        sync(file.path)


def _write_config(staging: Path, config: AnyConfig) -> UploadedFile:
    """Replace the maker's config by the resolved one: logical base id, never a path."""
    path = staging / CONFIG_NAME
    path.write_bytes(config_bytes(config))
    return uploaded(path)


def _describe(name: AdapterName, checked: Checked, files: dict[str, UploadedFile]) -> Version:
    beside = (CARD_NAME, *COMPANIONS)
    stored = {file_name: file for file_name, file in files.items() if file_name not in beside}
    version = Version(
        name=name,
        number=0,  # given when the row is written
        digest="",
        kind=kind_of(checked.card),
        base_id=checked.base.id,
        base_fingerprint=checked.card.get("base", {}).get("fingerprint", ""),
        rank=checked.rank,
        size_bytes=_size(checked, files),
        created_at=now(),
        files={file_name: file.sha256 for file_name, file in stored.items()},
        system_prompt=system_prompt(checked.card),
        card=checked.card,
    )
    return replace(version, digest=digest_of(version))


def _size(checked: Checked, files: dict[str, UploadedFile]) -> int:
    """Return the bytes that make the version special: its weights, else its prompt."""
    for file_name in (WEIGHTS_NAME, MODEL_NAME):
        if file_name in files:
            return files[file_name].size
    return len(canonical(checked.card["prompt"]))
