"""How one answer is judged, and what many judged answers add up to."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from training.evaluation.statistics import Interval, wilson

MetricName = Literal["exact", "json", "label"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, judged. `correct` is the recipe's metric; `facts` explain it."""

    correct: bool
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Score:
    """What the verdicts of one model add up to."""

    correct: int
    total: int
    share: Interval  # of correct answers
    details: dict[str, float]


def judge(metric: MetricName) -> Callable[[str, str], Verdict]:
    """Return the function (answer, expected) → verdict."""
    return {"exact": judge_exact, "json": judge_json, "label": judge_label}[metric]


def judge_exact(answer: str, expected: str) -> Verdict:
    """Equal but for space around it."""
    return Verdict(answer.strip() == expected.strip())


def judge_label(answer: str, expected: str) -> Verdict:
    """Equal but for case, spacing and a final full stop."""
    return Verdict(_plain(answer) == _plain(expected))


def judge_json(answer: str, expected: str) -> Verdict:
    """Equal as JSON values, whatever the order of keys; `expected` has `intent` and `slots`."""
    wanted = json.loads(expected)
    try:
        given = json.loads(answer)
    except (ValueError, RecursionError):
        given = None
    said = _slots(given)
    truth = _slots(wanted)
    return Verdict(
        _same(given, wanted),
        {
            "valid": given is not None,
            "intent": isinstance(given, dict) and given.get("intent") == wanted.get("intent"),
            "slots_right": len(said & truth),
            "slots_said": len(said),
            "slots_true": len(truth),
        },
    )


def score(verdicts: Sequence[Verdict]) -> Score:
    """Add up verdicts of one metric. Slot F1 is micro-averaged: over all slots of all answers."""
    correct = sum(verdict.correct for verdict in verdicts)
    details: dict[str, float] = {}
    if verdicts and "slots_true" in verdicts[0].facts:
        totals = {key: sum(v.facts[key] for v in verdicts) for key in verdicts[0].facts}
        details = {
            "valid_json": totals["valid"] / len(verdicts),
            "intent_accuracy": totals["intent"] / len(verdicts),
            "slot_f1": _f1(totals["slots_right"], totals["slots_said"], totals["slots_true"]),
        }
    return Score(correct, len(verdicts), wilson(correct, len(verdicts)), details)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def _slots(value: Any) -> set[tuple[str, str]]:
    """Return (name, value) pairs; the value as JSON, so that 1 and "1" differ."""
    slots = value.get("slots") if isinstance(value, dict) else None
    if not isinstance(slots, dict):
        return set()
    return {(name, json.dumps(item, sort_keys=True)) for name, item in slots.items()}


def _same(given: Any, wanted: Any) -> bool:
    """Compare as JSON does: true is not 1."""
    return json.dumps(given, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def _f1(right: int, said: int, true: int) -> float:
    """2·precision·recall / (precision + recall), which is 2·right / (said + true)."""
    return 2 * right / (said + true) if said + true else 1.0
