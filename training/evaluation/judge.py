"""Judge a trained run against its base: metrics, loss, and, when asked, what it forgot."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from registry.base import BaseModel
from training.card import write_card
from training.data.examples import Data
from training.evaluation.evaluate import Answer, Variant, evaluate, near_duplicates
from training.evaluation.forgetting import Forgetting, measure_forgetting
from training.evaluation.gate import complete_card, rounded
from training.evaluation.general import general_of
from training.evaluation.loss import held_out_loss
from training.model import Hardware
from training.progress import Report
from training.prompt import Prompter
from training.recipe import Recipe
from training.train import TrainedAdapter


def judge_trained(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    trained: TrainedAdapter,
    prompter: Prompter,
    answer: Answer,
    hardware: Hardware,
    *,
    progress: Report,
) -> TrainedAdapter:
    """Ask adapter and base the held-out examples in one mixed batch; complete the card."""
    system = recipe.task.system
    variants = [
        Variant.trained("adapter", base, system, trained.folder),
        Variant("base", base, system),
    ]
    judged = evaluate(
        recipe,
        data.held_out,
        variants,
        prompter,
        answer,
        progress=progress,
        near=near_duplicates(data),
    )
    with_adapter, without = (
        replace(one, loss=held_out_loss(v, data.held_out, prompter, hardware, progress=progress))
        for one, v in zip(judged, variants, strict=True)
    )
    return complete_card(trained, recipe, with_adapter, without)


def judge_forgetting(
    recipe: Recipe,
    data: Data,
    base: BaseModel,
    trained: TrainedAdapter,
    prompter: Prompter,
    answer: Answer,
    hardware: Hardware,
    *,
    progress: Report,
) -> TrainedAdapter:
    """Measure what the adapter forgot and write it into the card's metrics."""
    found = measure_forgetting(
        recipe.task,
        [example.completion for example in data.train],
        base,
        [Variant.trained("adapter", base, recipe.task.system, trained.folder)],
        prompter,
        answer,
        general_of(recipe),
        hardware,
        progress=progress,
    )
    metrics = trained.card["metrics"] | {"forgetting": forgetting_facts(found)}
    card = trained.card | {"metrics": metrics}
    write_card(trained.folder, card)
    return replace(trained, card=card)


def forgetting_facts(found: Sequence[Forgetting]) -> dict[str, Any]:
    """Return, by name, what the card holds: everything but the answers themselves."""
    return {one.name: _facts(one) for one in found}


def _facts(one: Forgetting) -> dict[str, Any]:
    facts = {key: value for key, value in asdict(one).items() if key not in ("name", "answers")}
    facts = {key: rounded(v) if isinstance(v, dict) else v for key, v in facts.items()}
    return {"perplexity": round(one.perplexity, 4)} | facts
