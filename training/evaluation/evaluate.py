"""Judge a model on held-out examples, by what it generates, and decide the gate."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.card import write_card
from training.data.examples import Example
from training.errors import TrainingError
from training.evaluation.metrics import Score, Verdict, judge, score
from training.progress import Progress, Report
from training.prompt import Prompter
from training.recipe import Gate, Recipe
from training.run import replace_file
from training.train import TrainedAdapter

# (prompts, max_new_tokens, done) → output ids per prompt; greedy; `done` is told how many are.
Generate = Callable[[Sequence[tuple[int, ...]], int, Callable[[int], None]], list[list[int]]]

ITEMS_FILE = "held_out.jsonl"


@dataclass(frozen=True, slots=True)
class Item:
    """One held-out example, what the model answered, and the verdict."""

    example: Example
    answer: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How one model did on the held-out examples."""

    items: tuple[Item, ...]
    score: Score


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether a version may be promoted; every reason why not."""

    passed: bool
    failures: tuple[str, ...]


def evaluate(
    recipe: Recipe,
    held_out: Sequence[Example],
    prompter: Prompter,
    generate: Generate,
    *,
    progress: Report,
    text: str = "",
) -> Evaluation:
    """Ask every held-out example, without examples in the prompt, and judge the answers."""
    prompts = [prompter.prompt_ids(example.turns) for example in held_out]
    total = len(prompts)

    def done(count: int) -> None:
        progress(Progress("evaluate", count, total, text))

    done(0)
    outputs = generate(prompts, recipe.task.max_new_tokens, done)
    if len(outputs) != total:
        raise TrainingError(f"{total} prompts were asked and {len(outputs)} answers came back.")
    judged = judge(recipe.task.metric)
    items = tuple(
        Item(example, answer, judged(answer, example.completion))
        for example, answer in zip(held_out, map(prompter.answer, outputs), strict=True)
    )
    return Evaluation(items, score([item.verdict for item in items]))


def remembered(folder: Path, base: BaseModel, generate: Generate) -> Generate:
    """Return `generate` of a base model with its answers kept in `folder`: it never changes."""

    def run(
        prompts: Sequence[tuple[int, ...]], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        facts = {
            "base": base.fingerprint,
            "prompts": [list(ids) for ids in prompts],
            "tokens": max_new_tokens,
            "torch": version("torch"),
        }
        path = folder / f"{hashlib.sha256(canonical(facts)).hexdigest()[:16]}.json"
        if path.is_file():
            done(len(prompts))
            return json.loads(path.read_text(encoding="utf-8"))
        answers = generate(prompts, max_new_tokens, done)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(answers).encode())
        return answers

    return run


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
                f"The adapter has {adapter.share} and the base {base.share}: a gain of "
                f"{100 * (value - base.share.value):.1f} points, below gate.min_gain = "
                f"{100 * gate.min_gain:g} points."
            )
    return GateDecision(not failures, tuple(failures))


def complete_card(
    trained: TrainedAdapter, recipe: Recipe, adapter: Evaluation, base: Evaluation | None
) -> TrainedAdapter:
    """Write metrics and gate into the adapter's card, and the answers beside its folder."""
    decision = decide(recipe.gate, adapter.score, base.score if base else None)
    metrics: dict[str, Any] = {"metric": recipe.task.metric, "adapter": _facts(adapter.score)}
    if base is not None:
        metrics["base"] = _facts(base.score)
        metrics["gain"] = round(adapter.score.share.value - base.score.share.value, 4)
    gate = {
        "passed": decision.passed,
        "failures": list(decision.failures),
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
    return {"answer": item.answer, "correct": item.verdict.correct, **item.verdict.facts}


def _facts(score: Score) -> dict[str, Any]:
    """Return a score as the card holds it: shares between 0 and 1."""
    interval = {"value": score.share.value, "low": score.share.low, "high": score.share.high}
    rounded = {key: round(value, 4) for key, value in (interval | score.details).items()}
    return {"correct": score.correct, "total": score.total, **rounded}
