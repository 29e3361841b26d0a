"""Many training runs as one: each step is one mixed batch through one frozen base.

Every adapter ends as it would alone, up to rounding: which rows it sees, its gradient, clipping,
optimiser and schedule are its own. What is shared is the pass through the base, which reads its
weights once for all of them. Because rounding depends on who else is in a batch, a run's key names
its whole group, and a resumed group starts at a step that all of it had reached.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from registry.base import BaseModel
from training.batches import MaskedSample
from training.card import read_card, write_card
from training.curve import draw_curve
from training.data.examples import Data
from training.errors import RecipeError, RunFailed
from training.evaluation.evaluate import Answer
from training.model import Hardware, detect_hardware
from training.progress import Report
from training.prompt import load_prompter
from training.recipe import Recipe
from training.replay import replay_rows
from training.rows import Rows, make_rows
from training.run import key_of, open_run
from training.together.model import SharedModel
from training.together.tenant import Member, Tenant, new_together_card
from training.train import TrainedAdapter, run_facts

KINDS = ("lora", "rslora")


@dataclass(frozen=True, slots=True)
class Job:
    """One recipe and its data."""

    recipe: Recipe
    data: Data


def train_together(
    jobs: Sequence[Job],
    base: BaseModel,
    runs: Path,
    *,
    progress: Report,
    show: Callable[[MaskedSample], None],
    hardware: Hardware | None = None,
    answer: Answer | None = None,
) -> list[TrainedAdapter | RunFailed]:
    """Train, continue, or find again the runs of all jobs; the outcomes are in their order.

    A run whose loss is not finite fails alone: it leaves the batch and its outcome is the error.
    Progress names the recipe; `answer` is as in `training.train.train`. Equal jobs, in any order,
    give equal bytes, also after interruptions.
    Raises RecipeError where a recipe cannot be trained in company, DataError, RunFailed when
    another process holds one of the runs, BaseUnavailable.
    """
    hardware = hardware or detect_hardware()
    check_recipes([job.recipe for job in jobs])
    rows = [_rows(job, base, answer, progress) for job in jobs]
    with ExitStack() as held:
        members = _open(jobs, rows, base, runs, hardware, held)
        for member in members:
            show(member.rows.shown)
        unfinished = [member for member in members if not member.run.finished]
        _fit(sorted(unfinished, key=lambda member: member.run.folder), progress)
        return [_outcome(member, member not in unfinished) for member in members]


def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Raise RecipeError naming the recipe and the key that cannot be trained together."""
    bases = {recipe.base: recipe.name for recipe in recipes}
    if len(bases) > 1:
        named = "; ".join(f"{name} has {base}" for base, name in bases.items())
        raise RecipeError(f"Together all recipes need the same base: {named}.")
    names = Counter(recipe.name for recipe in recipes)
    if twice := [name for name, count in names.items() if count > 1]:
        raise RecipeError(f"{', '.join(twice)} is given more than once.")
    for recipe in recipes:
        if unfit := _unfit(recipe):
            raise RecipeError(
                f"{recipe.name} has {unfit}, which is not trained together. Train it alone."
            )


def _unfit(recipe: Recipe) -> str | None:
    train = recipe.train
    for key, present in (
        (f"method.kind = {recipe.method.kind!r}", recipe.method.kind not in KINDS),
        (f"method.dropout = {recipe.method.dropout:g}", recipe.method.dropout > 0),
        ("train.eval_every", train.eval_every is not None),
        ("train.neftune_alpha", train.neftune_alpha is not None),
        ("a [preference]", recipe.preference is not None),
        ("report_to", bool(recipe.report_to)),
    ):
        if present:
            return key
    return None


def _rows(job: Job, base: BaseModel, answer: Answer | None, progress: Report) -> Rows:
    prompter = load_prompter(base.path, job.recipe.task.system)
    replayed = replay_rows(job.recipe, base, answer, progress)
    return make_rows(job.recipe, job.data, prompter, replayed)


def _open(
    jobs: Sequence[Job],
    rows: Sequence[Rows],
    base: BaseModel,
    runs: Path,
    hardware: Hardware,
    held: ExitStack,
) -> list[Member]:
    """Open the runs; what one depends on includes its company."""
    facts = [
        run_facts(job.recipe, job.data, base, hardware, of_job)
        for job, of_job in zip(jobs, rows, strict=True)
    ]
    keys = [key_of(alone) for alone in facts]
    if len(set(keys)) < len(keys):
        raise RecipeError("Two of the recipes train the very same adapter. Leave one of them out.")
    members = []
    for job, of_job, alone in zip(jobs, rows, facts, strict=True):
        run = held.enter_context(open_run(runs, alone | {"together": sorted(keys)}))
        members.append(Member(job.recipe, job.data, base, hardware, of_job, run))
    return members


def _fit(members: Sequence[Member], progress: Report) -> None:
    """Run the steps that are left; finished and failed runs leave, the others go on."""
    going = [member for member in members if member.failed_at is None]
    if not going:
        return
    start = min(member.run.last_step for member in going)
    members = [m for m in members if m.failed_at is None or m.failed_at >= start]
    model = SharedModel(members[0].base.path, [m.recipe for m in members], members[0].hardware)
    tenants = [
        Tenant(member, adapter, start, progress)
        for member, adapter in zip(members, model.adapters, strict=True)
    ]
    every = min(member.recipe.train.save_every for member in members)
    tenants = _leave(tenants)
    while tenants:
        tenants = _step(model, tenants)
        if any(tenant.done or tenant.step % every == 0 for tenant in tenants):
            for tenant in tenants:
                tenant.save()
            for tenant in tenants:
                tenant.forget_before()
        tenants = _leave(tenants)


def _step(model: SharedModel, tenants: Sequence[Tenant]) -> list[Tenant]:
    """Take one step with each tenant; return those whose loss was finite."""
    losses = model.losses([(tenant.adapter, tenant.batch()) for tenant in tenants])
    torch.stack(losses).sum().backward()
    going = []
    for tenant, loss in zip(tenants, losses, strict=True):
        try:
            tenant.learn(loss.item())
        except RunFailed:
            continue  # written down in its folder; `_outcome` reads it
        going.append(tenant)
    return going


def _leave(tenants: Sequence[Tenant]) -> list[Tenant]:
    """Publish those that are done, after a checkpoint of all: no replay needs them again."""
    for tenant in tenants:
        if tenant.done:
            tenant.publish()
    return [tenant for tenant in tenants if not tenant.done]


def _outcome(member: Member, reused: bool) -> TrainedAdapter | RunFailed:
    if failure := member.failure:
        return RunFailed(failure["message"])
    folder = member.run.adapter
    card = read_card(folder)
    if card["lineage"]["recipe_sha256"] != member.recipe.digest:  # judged or named differently now
        card = new_together_card(member)
        write_card(folder, card)
    draw_curve(member.run)
    curve = member.run.curve if member.run.curve.exists() else None
    return TrainedAdapter(folder, card, member.rows.dropped, reused, curve)
