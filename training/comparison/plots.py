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
REQUESTS = 10_000
LABEL, LINE = 0.24, 0.055  # width and height of a name, as parts of the axes

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
    for kept, row in [(row.forgetting, row) for row in rows]:
        if kept:
            reach = [kept.qa_low, kept.qa_high]
            axes.plot(reach, [row.value] * 2, color=COLOURS[row.strategy], alpha=0.35, linewidth=1)
    if comparison.untouched:
        axes.axvline(comparison.untouched.qa_accuracy, color=INK, alpha=0.4, linestyle=":")
    _scatter(axes, points, comparison)
    _percent(axes.xaxis)
    axes.set_xlim(-0.05, 1.05)
    axes.set_xlabel("general questions answered right, with it on")
    _name(axes, points)
    return True


def draw_cost(comparison: Comparison, axes: Axes) -> bool:
    """Quality against the compute of training and of many requests' prompts."""
    size = comparison.setup.parameters
    points = [
        (row.cost.train_flops + REQUESTS * row.cost.prompt_tokens * 2 * size, row)
        for row in comparison.rows
    ]
    _scatter(axes, points, comparison)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 2)
    axes.set_xlabel(f"FLOPs: training, and the prompts of {REQUESTS:,} requests")
    _name(axes, points)
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
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted(FuncFormatter(_one_two_five))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend(fontsize=8)
    return True


def _scatter(axes: Axes, points: Sequence[tuple[float, Row]], comparison: Comparison) -> None:
    """Draw rows with their 95 % intervals."""
    for x, row in points:
        share = interval(row.runs, comparison.groups)
        error = [[share.value - share.low], [share.high - share.value]]
        axes.errorbar(x, share.value, yerr=error, fmt="o", color=COLOURS[row.strategy], capsize=3)
    _percent(axes.yaxis)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(f"held-out {comparison.setup.metric}")


def _name(axes: Axes, points: Sequence[tuple[float, Row]]) -> None:
    """Write names beside points, one below the other where points are close.

    Close is meant on the drawing, so the axes must have their scales and limits by now.
    """
    taken: list[tuple[float, float]] = []
    for x, row in sorted(points, key=lambda point: -point[1].value):
        place = axes.transAxes.inverted().transform(axes.transData.transform((x, row.value)))
        across, up = float(place[0]), float(place[1])
        left = across > 0.75  # no room to the right
        at = across - LABEL if left else across
        while any(abs(at - x2) < LABEL and abs(up - y2) < LINE for x2, y2 in taken):
            up -= LINE
        taken.append((at, up))
        axes.annotate(
            row.name,
            (x, row.value),
            xytext=(across + (-0.02 if left else 0.02), up),
            textcoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": COLOURS[row.strategy], "alpha": 0.5},
        )


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


def _one_two_five(value: float, _: int | None) -> str:
    """Label 1, 2 and 5 of each decade of a log axis."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


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
