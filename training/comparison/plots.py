"""The plots of a report, as SVG that takes its text colour from the page around it."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from training.comparison.result import Comparison, Point, Row, Strategy
from training.comparison.significance import interval

# Readable on white and on near black. One colour a strategy, the same in every plot.
COLOURS: dict[Strategy, str] = {
    "prompt": "#808080",
    "few-shot": "#c27c0e",
    "LoRA": "#2f7fd1",
    "PEFT variant": "#1a9c8c",
    "full": "#cf4f3e",
    "extracted": "#9a63c9",
    "replay": "#4f9a2e",
}
INK = "#010203"  # drawn with this, written as currentColor
SIZE = (6.4, 4.0)  # inches; the page scales it

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and can be searched
    "svg.hashsalt": "wardrobe",  # the same figures, the same file
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}


def draw_plots(comparison: Comparison) -> dict[str, str]:
    """Return name → SVG of each plot that has something to show."""
    plots: dict[str, Callable[[Comparison, Axes], bool]] = {
        "forgetting": draw_forgetting,
        "cost": draw_cost,
        "examples": draw_examples,
        "rank": draw_rank,
        "loss": draw_losses,
    }
    drawn: dict[str, str] = {}
    for name, draw in plots.items():
        with _figure() as figure:
            if draw(comparison, figure.add_subplot()):
                drawn[name] = _svg(figure, name)
    return drawn


def draw_forgetting(comparison: Comparison, axes: Axes) -> bool:
    """Learning against forgetting: up is better at the task, right keeps more."""
    rows = [row for row in comparison.rows if row.forgetting is not None]
    if len(rows) < 2:
        return False
    points = [(row.forgetting.qa_accuracy, row) for row in rows if row.forgetting]
    _scatter(axes, points, comparison)
    _percent(axes.xaxis)
    axes.set_xlim(-0.05, 1.05)
    axes.set_xlabel("general questions answered right, adapter on")
    axes.set_ylabel(f"held-out {comparison.setup.metric}")
    return True


def draw_cost(comparison: Comparison, axes: Axes) -> bool:
    """Quality against what a request costs in prompt tokens."""
    _scatter(axes, [(row.cost.prompt_tokens, row) for row in comparison.rows], comparison)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(
        FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}"[0] in "25" else "")
    )
    axes.set_xlabel("prompt tokens a request")
    axes.set_ylabel(f"held-out {comparison.setup.metric}")
    return True


def draw_examples(comparison: Comparison, axes: Axes) -> bool:
    """How much the metric owes to the number of training examples."""
    return _curves(comparison.by_examples, "training examples", comparison, axes)


def draw_rank(comparison: Comparison, axes: Axes) -> bool:
    """Which rank keeps the metric."""
    return _curves(comparison.by_rank, "rank", comparison, axes)


def draw_losses(comparison: Comparison, axes: Axes) -> bool:
    """The training loss of each row's first seed."""
    for name, line in comparison.losses.items():
        colour = COLOURS[comparison.row(name).strategy]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2, label=name)
    if not comparison.losses:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend(fontsize=8)
    return True


def _scatter(axes: Axes, points: Sequence[tuple[float, Row]], comparison: Comparison) -> None:
    """Draw rows with their 95 % intervals; each is named beside its point."""
    for x, row in points:
        share = interval(row.runs, comparison.groups)
        error = [[share.value - share.low], [share.high - share.value]]
        axes.errorbar(x, share.value, yerr=error, fmt="o", color=COLOURS[row.strategy], capsize=3)
    _percent(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)
    _name(axes, [(x, row.value, row.name) for x, row in points])


def _name(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points; names of points at the same place go below each other."""
    taken: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        below = y
        while any(
            abs(x - other) < 0.2 * max(x, other, 0.1) and abs(below - height) < 0.05
            for other, height in taken
        ):
            below -= 0.05
        taken.append((x, below))
        axes.annotate(name, (x, below), xytext=(7, -3), textcoords="offset points", fontsize=8)


def _curves(points: Sequence[Point], x: str, comparison: Comparison, axes: Axes) -> bool:
    series = list(dict.fromkeys(point.series for point in points))
    for number, name in enumerate(series):
        line = sorted((p for p in points if p.series == name), key=lambda point: point.x)
        shares = [interval(point.runs, comparison.groups) for point in line]
        axes.errorbar(
            [point.x * 1.02**number for point in line],  # bars beside each other can be told apart
            [share.value for share in shares],
            yerr=[
                [share.value - share.low for share in shares],
                [share.high - share.value for share in shares],
            ],
            fmt="o-",
            capsize=3,
            label=name,
            color=list(COLOURS.values())[2 + number],
        )
    if not series:
        return False
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xticks(sorted({point.x for point in points}))
    _percent(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(x)
    axes.set_ylabel(f"held-out {comparison.setup.metric}")
    axes.legend(fontsize=8)
    return True


def _percent(axis: Any) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


@contextmanager
def _figure() -> Iterator[Figure]:
    with mpl.rc_context(cast(Any, _STYLE)):  # its keys are too many to type
        yield Figure(figsize=SIZE, layout="constrained")


def _svg(figure: Figure, name: str) -> str:
    """Return the SVG element alone: no prologue, no fixed size, ids that no other plot has."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)
