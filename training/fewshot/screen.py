"""How a measured few-shot recipe looks on a terminal."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table


def measured_table(lineage: Mapping[str, Any]) -> Table:
    """Return a line for each number of examples, with and without the list; shares over draws."""
    ways: dict[tuple[int, bool], list[Mapping[str, Any]]] = {}
    for line in lineage["measurements"]:
        ways.setdefault((line["k"], line["listed"]), []).append(line)
    chosen = (lineage["chosen"]["k"], lineage["chosen"]["listed"])
    side, items = lineage["measured_on"], lineage["measured_examples"]
    table = Table(title=f"prompts on {items} examples of the {side} side")
    for column in ("examples", "list", "mean of draws", "draws", "prompt tokens", ""):
        table.add_column(column)
    for way, draws in ways.items():
        table.add_row(
            str(way[0]),
            "yes" if way[1] else "no",
            f"{100 * fmean(_values(draws)):.1f} %",
            " ".join(f"{100 * value:.0f}" for value in _values(draws)),
            f"{fmean(line['prompt_tokens'] for line in draws):.0f}",
            "chosen" if way == chosen else "",
        )
    return table


def _values(draws: Sequence[Mapping[str, Any]]) -> list[float]:
    return [line["value"] for line in draws]
