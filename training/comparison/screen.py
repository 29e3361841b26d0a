"""A comparison and a sweep on the terminal: the short of it."""

from collections.abc import Sequence

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from training.comparison.result import Comparison, LeftOut
from training.comparison.sweep import Sweep
from training.comparison.tables import by_value, quality_cells


def comparison_summary(comparison: Comparison) -> Group:
    """Return the verdict, the rows with their intervals, and what was left out."""
    verdict = comparison.verdict
    words = Text(verdict.headline, style="bold")
    for finding in verdict.findings:
        words.append(f"\n• {finding}", style="not bold")
    table = Table("", comparison.setup.metric, "against the best", "prompt tokens")
    for row in by_value(comparison):
        name = f"{row.name} ← ship" if row.name == verdict.ship else row.name
        tokens = f"{row.cost.prompt_tokens:.0f}"
        table.add_row(name, *quality_cells(comparison, row), tokens)
    return Group(Panel(words), table, *left_out_lines(comparison.left_out))


def sweep_summary(sweep: Sweep, left_out: Sequence[LeftOut]) -> Group:
    """Return the trials, best first, with what validation says of each."""
    table = Table("", "set", "validation (95 % interval)")
    for one in sorted(sweep.tried, key=lambda one: -one.share.value):
        mark = "best" if one is sweep.best else ""
        table.add_row(mark, ", ".join(one.trial), str(one.share))
    return Group(table, *left_out_lines(left_out))


def left_out_lines(left_out: Sequence[LeftOut]) -> list[Padding]:
    return [
        Padding(Text(f"left out: {left.cell}: {left.reason}", style="yellow"), (0, 1))
        for left in left_out
    ]
