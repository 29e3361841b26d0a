"""The loss of a run as a picture beside its numbers."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from training.run import Run, replace_file


def draw_curve(run: Run) -> None:
    """Draw the finished run once, where matplotlib is installed. Equal numbers, equal bytes."""
    if run.curve.exists() or find_spec("matplotlib") is None:
        return
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "wardrobe", "svg.fonttype": "none"}):
        replace_file(run.curve, _svg(run.read_metrics()))


def _svg(lines: Sequence[Mapping[str, Any]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for key, name, marker in (("loss", "training", ""), ("validation_loss", "validation", "o")):
        steps = [line["step"] for line in lines if key in line]
        losses = [line[key] for line in lines if key in line]
        if steps:
            axes.plot(steps, losses, label=name, marker=marker, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
