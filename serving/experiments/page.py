"""The report of an experiment as a page of Markdown: what was asked, found, decided and why."""

from collections.abc import Mapping, Sequence
from typing import Any


def write_page(facts: Mapping[str, Any]) -> str:
    """Return the page for what `describe` found."""
    parts = [
        f"# {facts['id']} on {facts['name']}",
        f"**{_plain(facts['sentence'])}**",
        _state(facts),
        "## Arms",
        _table(
            ("arm", "version", "share", "units", "answers", "without an end", "rated"),
            _arms(facts),
        ),
        "## Metrics",
        _table(
            ("metric", "role", "arm", "control", "arm's", "difference at every look", "p"),
            [_metric(facts, reading) for reading in facts["metrics"]],
        ),
        *(f"> {_plain(note)}" for note in facts["notes"]),
        "## Decisions",
        _table(
            ("when", "what", "who", "why", "webhook"),
            [
                (d["at"][:19], d["action"], d["actor"], d["reason"], d["webhook"])
                for d in facts["decisions"]
            ],
        ),
    ]
    if facts["comments"]:
        rows = [(c["at"][:19], c["arm"], c["text"]) for c in facts["comments"]]
        parts += ["## Comments", _table(("when", "arm", "comment"), rows)]
    return "\n\n".join(parts) + "\n"


def _state(facts: Mapping[str, Any]) -> str:
    lines = [
        f"{facts['state']}, exposure {100 * facts['exposure']:g} %, alpha {facts['alpha']:g}",
        f"made {facts['created_at'][:19]}, started {(facts['started_at'] or 'never')[:19]}, "
        f"ended {(facts['ended_at'] or 'not yet')[:19]}",
    ]
    if facts["ramp"]:
        lines.append(f"ramp {' → '.join(facts['ramp'])}")
    if facts["layer"]:
        lines.append(f"layer {facts['layer']['layer']}, {_span(facts['layer'])} of its units")
    return "  \n".join(lines)


def _span(part: Mapping[str, Any]) -> str:
    return f"{part['low']:g} to {part['high']:g}"


def _arms(facts: Mapping[str, Any]) -> list[tuple[object, ...]]:
    counted = zip(facts["units"], facts["answers"], facts["unended"], facts["rated"], strict=True)
    return [
        (arm["label"], arm["version"], f"{arm['share']:g}", *numbers[:3], f"{numbers[3]:.1%}")
        for arm, numbers in zip(facts["arms"], counted, strict=True)
    ]


def _metric(facts: Mapping[str, Any], reading: Mapping[str, Any]) -> tuple[object, ...]:
    role = next(m["role"] for m in facts["metrics_declared"] if m["name"] == reading["metric"])
    return (reading["metric"], role, reading["arm"], *values_of(reading), f"{reading['p']:.3g}")


def values_of(reading: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the control's value, the arm's, and the difference with its interval."""
    span = "collecting"
    if not reading["collecting"]:
        span = f"{reading['difference']:+.4g} ({reading['low']:+.4g} to {reading['high']:+.4g})"
    return f"{reading['control']:.4g}", f"{reading['treated']:.4g}", span


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Keep what people wrote inside its cell, and from being read as markup."""
    for letter in "\\`*_[]<>|#":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())
