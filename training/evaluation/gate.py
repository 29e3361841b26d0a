"""What an evaluation decides and leaves behind: the gate, the card, and every answer in a file."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from training.card import write_card
from training.conversion import Conversion
from training.evaluation.evaluate import Evaluation, Item
from training.evaluation.metrics import Score
from training.evaluation.statistics import paired
from training.recipe import Gate, Recipe
from training.run import replace_file
from training.train import TrainedAdapter

ITEMS_FILE = "held_out.jsonl"


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether a version may be promoted; every reason why not."""

    passed: bool
    failures: tuple[str, ...]


def decide(gate: Gate, adapter: Score, base: Score | None) -> GateDecision:
    """Compare the held-out shares with the recipe's thresholds. No threshold is passed unsaid."""
    failures: list[str] = []
    value = adapter.share.value
    if gate.min_value is not None and value < gate.min_value:
        failures.append(
            f"The metric is {adapter.share}, below gate.min_value = {100 * gate.min_value:g} %."
        )
    if gate.min_gain is not None:
        if base is None:
            failures.append("gate.min_gain is set and the base model was not evaluated.")
        elif value - base.share.value < gate.min_gain:
            failures.append(
                f"It has {adapter.share} and the base {base.share}: a gain of "
                f"{100 * (value - base.share.value):.1f} points, below gate.min_gain = "
                f"{100 * gate.min_gain:g} points."
            )
    return GateDecision(not failures, tuple(failures))


def complete_card(
    trained: TrainedAdapter, recipe: Recipe, adapter: Evaluation, base: Evaluation | None
) -> TrainedAdapter:
    """Write metrics and gate into the adapter's card, and the answers beside its folder."""
    decision = decide(recipe.gate, adapter.score, base.score if base else None)
    metrics: dict[str, Any] = {"metric": recipe.task.metric, "adapter": facts_of(adapter)}
    if base is not None:
        groups = [item.example.group for item in adapter.items]
        metrics["base"] = facts_of(base)
        metrics["gain"] = round(adapter.score.share.value - base.score.share.value, 4)
        metrics["difference"] = rounded(asdict(paired(base.values, adapter.values, groups)))
    lost = trained.card["lineage"].get("conversion")
    failures = [*(Conversion(**lost).failures if lost else ()), *decision.failures]
    gate = {
        "passed": not failures,
        "failures": failures,
        "rules": asdict(recipe.gate),
    }
    card = trained.card | {"metrics": metrics, "gate": gate}
    write_card(trained.folder, card)
    write_items(trained.folder.parent / ITEMS_FILE, adapter, base)
    return replace(trained, card=card)


def write_items(path: Path, adapter: Evaluation, base: Evaluation | None) -> None:
    """Write one JSON line an example: what was asked, expected, and answered by whom."""
    lines: list[str] = []
    for number, item in enumerate(adapter.items):
        line: dict[str, Any] = {
            "prompt": [[turn.role, turn.content] for turn in item.example.turns],
            "group": item.example.group,
            "expected": item.example.completion,
            "adapter": _answer(item),
        }
        if base is not None:
            line["base"] = _answer(base.items[number])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    replace_file(path, "".join(lines).encode())


def _answer(item: Item) -> dict[str, Any]:
    verdict = item.verdict
    return {"answer": item.answer, "value": verdict.value, "correct": verdict.correct} | (
        verdict.facts
    )


def facts_of(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as the card holds it; shares are between 0 and 1."""
    tokens = sum(item.prompt_tokens for item in evaluation.items) / len(evaluation.items)
    facts = _score_facts(evaluation.score) | {"prompt_tokens": round(tokens, 1)}
    facts["parts"] = {name: _score_facts(part) for name, part in evaluation.parts.items()}
    return facts | ({"loss": rounded(asdict(evaluation.loss))} if evaluation.loss else {})


def _score_facts(score: Score) -> dict[str, Any]:
    facts = {"correct": score.correct, "total": score.total, "groups": score.groups}
    facts |= rounded(asdict(score.share)) | {
        "details": {name: rounded(asdict(detail)) for name, detail in score.details.items()}
    }
    return facts | ({"errors": score.errors} if score.errors else {})


def rounded(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()}
