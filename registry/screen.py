"""How the registry's facts look: JSON for scripts, rich tables for people."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from registry.adapter import AdapterName, Version
from registry.errors import Problem
from registry.records import Alias, Event, Rollout
from registry.store import Registry

_STATES = {"live": "green", "warming": "yellow", "failed": "red"}
_ALIKE = 3  # problems of one code that are written out: a wrong file is wrong in every layer
# Columns whose short texts stay on one line; the others fold when the terminal is narrow.
_WHOLE = ("newest", "version", "digest", "when", "pushed", "moved", "after")


@dataclass(frozen=True, slots=True)
class Summary:
    """One line of `wardrobe list`."""

    name: AdapterName
    versions: int
    latest: int
    base_id: str
    aliases: dict[str, int]  # alias → version number
    updated_at: str


def summaries(registry: Registry) -> list[Summary]:
    pointers: dict[AdapterName, dict[str, int]] = {}
    for alias in registry.all_aliases():
        pointers.setdefault(alias.name, {})[alias.alias] = alias.number
    counts = registry.newest()
    return [_summary(version, count, pointers.get(version.name, {})) for version, count in counts]


def plain(value: object) -> Any:
    """Turn facts into what JSON knows; a name is written as NAMESPACE/NAME."""
    if isinstance(value, AdapterName | Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        items = cast("Mapping[str, object]", value).items()
        return {key: plain(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("Sequence[object]", value)]
    return value


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Write problems a line each; of many with one code the first ones, and how many follow."""
    alike: dict[str, list[str]] = {}
    for code, text in problems:
        alike.setdefault(code, []).append(text)
    lines: list[str] = []
    for code, texts in alike.items():
        lines += [f"{code}: {text}" for text in texts[:_ALIKE]]
        if len(texts) > _ALIKE:
            lines.append(f"{code}: and {len(texts) - _ALIKE} more like these")
    return lines


def print_json(value: object) -> None:
    # In ASCII: no terminal and no locale can spoil it.
    sys.stdout.write(json.dumps(plain(value), indent=2) + "\n")


def shown(text: str) -> str:
    """Write text of others for the terminal: no markup, no control character that steers it."""
    visible = (char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
    return escape("".join(visible))


def summary_table(found: Sequence[Summary]) -> Table:
    rows = (
        (
            f"[bold]{line.name}[/]\n{line.base_id}",
            f"v{line.latest}",
            "\n".join(f"{alias} → v{number}" for alias, number in line.aliases.items()) or "–",
            line.updated_at[:10],
        )
        for line in found
    )
    return _table(("adapter, its base", "newest", "aliases", "pushed"), rows)


def version_table(versions: Sequence[Version]) -> Table:
    rows = (
        (
            f"v{version.number}",
            version.digest[:12],
            version.kind,
            str(version.rank or "–"),
            decimal(version.size_bytes),
            _gate(version),
            _when(version.created_at),
        )
        for version in versions
    )
    titles = ("version", "digest", "kind", "rank", "size", "gate", "pushed")
    return _table(titles, rows, title=str(versions[0].name))


def version_lines(version: Version) -> list[str]:
    """Return everything about one version, a line a fact."""
    facts = {
        "version": version.ref.label,
        "digest": f"sha256:{version.digest}",
        "base": version.base_id,
        "kind": f"{version.kind}, {_rank(version)}{version.size_bytes:,} bytes",
        "pushed": version.created_at,
        "system prompt": version.system_prompt or "–",
        "examples": str(len(version.examples) or "–"),
        **{f"file {name}": sha256 for name, sha256 in version.files.items()},
        **{
            f"card {key}": json.dumps(value, ensure_ascii=False)
            for key, value in version.card.items()
        },
    }
    lines = [f"[bold]{shown(key)}[/]: {shown(value)}" for key, value in facts.items()]
    return [*lines, f"[bold]gate result[/]: {_gate(version)}"]


def alias_table(aliases: Sequence[Alias]) -> Table:
    rows = (
        (alias.alias, f"v{alias.number}", str(alias.generation), _when(alias.moved_at))
        for alias in aliases
    )
    return _table(("alias", "version", "generation", "moved"), rows)


def rollout_table(rollouts: Sequence[Rollout]) -> Table:
    rows = (
        (
            rollout.url,
            rollout.alias,
            f"v{rollout.number}",
            f"[{_STATES[rollout.state]}]{rollout.state}[/]",
            f"{rollout.seconds:.2f} s",
            shown(rollout.message),
        )
        for rollout in rollouts
    )
    return _table(("server", "alias", "version", "state", "after", "message"), rows)


def rollout_line(rollout: Rollout) -> str:
    if rollout.state == "failed":
        return f"[red]failed on {shown(rollout.url)}: {shown(rollout.message)}[/]"
    return f"[green]live[/] on {shown(rollout.url)} after {rollout.seconds:.2f} s"


def history_table(events: Sequence[Event]) -> Table:
    rows = (
        (
            _when(event.at),
            event.action + (" (forced)" if event.forced else ""),
            event.alias or "",
            f"v{event.previous} → v{event.number}" if event.previous else f"v{event.number}",
            shown(event.actor),
            shown(event.reason),
        )
        for event in events
    )
    return _table(("when", "action", "alias", "version", "who", "why"), rows)


def _summary(newest: Version, versions: int, aliases: dict[str, int]) -> Summary:
    return Summary(
        name=newest.name,
        versions=versions,
        latest=newest.number,
        base_id=newest.base_id,
        aliases=aliases,
        updated_at=newest.created_at,
    )


def _gate(version: Version) -> str:
    if "gate" not in version.card:
        return "–"
    failures = version.gate_failures
    return f"[red]failed: {shown('; '.join(failures))}[/]" if failures else "[green]passed[/]"


def _rank(version: Version) -> str:
    return f"rank {version.rank}, " if version.rank else ""


def _when(iso: str) -> str:
    return iso[:16].replace("T", " ")


def _table(
    titles: Sequence[str], rows: Iterator[tuple[str, ...]], title: str | None = None
) -> Table:
    table = Table(title=title, title_justify="left")
    for name in titles:
        table.add_column(name, overflow="fold", no_wrap=name in _WHOLE)
    for row in rows:
        table.add_row(*row)
    return table
