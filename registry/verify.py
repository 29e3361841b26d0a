"""A full check of a store: every byte that any version names is read and hashed."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Row, select

from registry.adapter import Version
from registry.blobs import Blobs
from registry.database import Database
from registry.errors import IntegrityError, StoreUnavailable
from registry.manifest import digest_of
from registry.records import VerifyReport
from registry.tables import alias_stack, aliases
from registry.versions import all_versions

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def verify(database: Database, blobs: Blobs, progress: Progress | None) -> VerifyReport:
    """Check rows, digests, aliases and blobs. Finds problems instead of raising them."""
    problems = [f"SQLite: {line}" for line in database.quick_check()]
    with database.read() as connection:
        versions = all_versions(connection)
        pointers = connection.execute(select(aliases)).all()
        stacked = connection.execute(select(alias_stack)).all()
    problems += _check_rows(versions)
    problems += _check_pointers(versions, list(pointers), list(stacked))
    # Listed after the rows were read: a blob is always there before its row.
    sizes = blobs.sizes()
    needed = {sha256: version for version in versions for sha256 in version.files.values()}
    problems += _check_blobs(needed, sizes, blobs, progress)
    orphans = tuple(sorted(set(sizes) - set(needed)))
    present = sum(sizes[sha256] for sha256 in needed if sha256 in sizes)
    return VerifyReport(len(versions), len(needed), present, tuple(problems), orphans)


def _check_rows(versions: list[Version]) -> list[str]:
    return [
        f"{version.ref.label}: its record does not fit its digest {version.digest}."
        for version in versions
        if digest_of(version) != version.digest
    ]


def _check_pointers(
    versions: list[Version], pointers: list[Row[Any]], stacked: list[Row[Any]]
) -> list[str]:
    known = {(v.name.namespace, v.name.name, v.number) for v in versions}
    tops = {(row.namespace, row.name, row.alias, row.depth): row.number for row in stacked}
    problems = [
        f"{row.namespace}/{row.name}@{row.alias} points to v{row.number}, which does not exist."
        for row in [*pointers, *stacked]
        if (row.namespace, row.name, row.number) not in known
    ]
    return problems + [
        f"{row.namespace}/{row.name}@{row.alias} does not agree with its history."
        for row in pointers
        if tops.get((row.namespace, row.name, row.alias, row.depth)) != row.number
    ]


def _check_blobs(
    needed: dict[str, Version], sizes: dict[str, int], blobs: Blobs, progress: Progress | None
) -> list[str]:
    problems: list[str] = []
    total, done = sum(sizes.get(sha256, 0) for sha256 in needed), 0
    for sha256, version in needed.items():
        try:
            done += blobs.check(sha256)
        except (IntegrityError, StoreUnavailable) as error:
            problems.append(f"{version.ref.label}: {error.message}")
            done += sizes.get(sha256, 0)
        if progress:
            progress(done, total)
    return problems
