"""A benchmark's figures as a picture, SVG or PNG by the name of the file: `--plot FILE`."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib is an extra: nobody needs it for the tables
    from matplotlib.axes import Axes

COLOURS = ("#2f7fd1", "#c27c0e", "#1a9c8c", "#9a63c9", "#cf4f3e", "#808080")
WIDTH = 7.2  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "wardrobe",  # equal figures, equal bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and, where it was measured more than once, its range."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""  # behind the figure

    @classmethod
    def of(cls, values: Sequence[float], note: str = "") -> "Bar":
        return cls(statistics.median(values), min(values), max(values), note)


@dataclass(frozen=True, slots=True)
class Plot:
    """Where a picture goes, and what stands above it."""

    path: Path
    title: str


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot", type=picture, metavar="FILE", help="also draw the figures: .svg or .png"
    )


def picture(text: str) -> Path:
    """Return the path. What is wrong with it is said before anything is measured."""
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither .svg nor .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {str(path.parent)!r}")
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("matplotlib is missing: pip install 'wardrobe[report]'")
    return path


def draw_bars(
    plot: Plot, unit: str, groups: Mapping[str, Mapping[str, Bar]], *, digits: int = 0
) -> None:
    """Draw group → series → figure as bars that lie, a colour for each series."""
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    lines = sum(map(len, groups.values())) + len(groups)

    def draw(axes: "Axes") -> None:
        place, ticks = 0.0, list[float]()
        for bars in groups.values():
            for number, (name, bar) in enumerate(bars.items()):
                at = place + number
                colour = COLOURS[series.index(name) % len(COLOURS)]
                axes.barh(at, bar.value, 0.85, color=colour)
                end = bar.value
                if bar.low is not None and bar.high is not None and bar.low < bar.high:
                    axes.plot([bar.low, bar.high], [at, at], color="black", linewidth=1)
                    end = max(end, bar.high)
                text = f" {bar.value:.{digits}f}{bar.note}"
                axes.text(end, at, text, va="center", fontsize=8)
            ticks.append(place + (len(bars) - 1) / 2)
            place += len(bars) + 1
        axes.set_yticks(ticks, list(groups))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        if len(series) > 1:
            handles = [axes.barh(0, 0, color=COLOURS[i % len(COLOURS)]) for i in range(len(series))]
            axes.legend(handles, series, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)

    _save(plot, 0.19 * lines + 1.2, draw)


def draw_dots(plot: Plot, unit: str, rows: Mapping[str, Sequence[float]]) -> None:
    """Draw every measurement as a dot, a row for each name, and the medians as strokes."""

    def draw(axes: "Axes") -> None:
        for at, values in enumerate(rows.values()):
            axes.plot(values, [at] * len(values), "o", color=COLOURS[0], alpha=0.5, markersize=4)
            median = statistics.median(values)
            axes.plot([median, median], [at - 0.3, at + 0.3], color="black", linewidth=1.5)
            axes.text(median, at - 0.32, f"{median:.0f}", ha="center", va="bottom", fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.set_xlim(left=0)
        axes.grid(visible=True, axis="x", alpha=0.2)

    _save(plot, 0.4 * len(rows) + 1.0, draw)


def _save(plot: Plot, height: float, draw: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        figure.suptitle(plot.title, fontsize=8, wrap=True)
        date = {"Date": None} if plot.path.suffix == ".svg" else None
        figure.savefig(plot.path, dpi=150, metadata=date)
    print(f"\nDrawn: {plot.path}")
