"""How an inspection of data looks on a terminal."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from registry.screen import shown
from training.data.checks import Finding, side_name
from training.data.inspection import Histogram, Inspection

_COLOURS = {"error": "red", "warning": "yellow"}
_BAR = 30  # characters of the longest bar
_LABELS = 12  # labels that are listed; the rest is counted


def inspection_lines(inspection: Inspection) -> Iterator[RenderableType]:
    """Yield what stands one below the other: sides, lengths, labels, findings, the verdict."""
    yield _sides(inspection)
    for title, found in (
        ("prompt", inspection.prompt_tokens),
        ("completion", inspection.completion_tokens),
    ):
        if found is not None:
            yield _histogram(f"tokens of a {title}", found)
    if inspection.labels:
        yield _labels(inspection)
    for finding in inspection.findings:
        yield from _finding(finding)
    warnings = len(inspection.findings) - inspection.errors
    colour = "red" if inspection.errors else "yellow" if warnings else "green"
    yield f"[{colour}]{_count(inspection.errors, 'error')}, {_count(warnings, 'warning')}[/]"


def _sides(inspection: Inspection) -> Table:
    table = Table("side", title="what training gets")
    table.add_column("rows", justify="right")
    table.add_column("groups", justify="right")
    for side, rows in inspection.rows.items():
        table.add_row(side_name(side), f"{rows:,}", f"{inspection.groups[side]:,}")
    return table


def _histogram(title: str, found: Histogram) -> Table:
    table = Table(title=f"{title}: median {found.median}, most {found.most}", box=None)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    table.show_header = False
    ends = [*(edge - 1 for edge in found.edges[1:]), found.most]
    for first, last, count in zip(found.edges, ends, found.counts, strict=True):
        bar = "█" * round(_BAR * count / max(found.counts)) or ("▏" if count else "")
        table.add_row(f"{first}–{last}", f"{count:,}", Text(bar, style="cyan"))
    return table


def _labels(inspection: Inspection) -> Table:
    train = inspection.labels["train"]
    table = Table("label", title=f"{len(train)} labels, by their training rows")
    for side in inspection.labels:
        table.add_column(side_name(side), justify="right")
    for label in list(train)[:_LABELS]:
        counts = [str(rows.get(label, 0)) for rows in inspection.labels.values()]
        table.add_row(shown(label), *counts)
    if len(train) > _LABELS:
        table.add_row(f"… and {len(train) - _LABELS} more", *[""] * len(inspection.labels))
    return table


def _finding(finding: Finding) -> Iterator[str]:
    colour = _COLOURS[finding.severity]
    yield f"[{colour}]{finding.severity}[/] [bold]{finding.code}[/]: {shown(finding.sentence)}"
    yield from (f"  [dim]{shown(row)}[/]" for row in finding.rows)
    if finding.count > len(finding.rows) > 0:
        yield f"  [dim]… and {finding.count - len(finding.rows):,} more[/]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
