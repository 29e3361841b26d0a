"""wardrobe train: recipes become adapters, judged and pushed."""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from registry import commands as registry_commands
from registry.adapter import PRODUCTION, AdapterName
from registry.base import BaseModel
from registry.commands import Home, actor, clear_errors, open_registry
from registry.errors import WardrobeError
from registry.home import default_home
from training.commands.bases import find_base, known_bases
from training.commands.engines import answer_once, open_engines
from training.commands.options import Overrides
from training.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from training.batches import MaskedSample
    from training.data.examples import Data
    from training.evaluation.evaluate import Answer
    from training.progress import Report
    from training.recipe import Recipe
    from training.train import TrainedAdapter

# torch and transformers are imported where a command needs them, so that `--help` answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False)
out = Console(soft_wrap=True)


@app.command()
@clear_errors()
def train(
    context: typer.Context,
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Folders with a recipe.toml.")
    ],
    overrides: Overrides = None,
    together: Annotated[
        bool,
        typer.Option("--together", help="Train all at once over one base, in mixed batches."),
    ] = False,
    push: Annotated[bool, typer.Option("--push", help="Store the result as a version.")] = False,
    promote: Annotated[
        bool, typer.Option("--promote", help="Push, and point production to it if its gate passed.")
    ] = False,
    copy_to: Annotated[
        Path | None, typer.Option("--out", help="Also write the adapter to this new folder.")
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option(help="Train in the processes of this file, written by `accelerate config`."),
    ] = None,
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="Also measure what general ability is lost.")
    ] = False,
    home: Home = None,
) -> None:
    """Train adapters, judge them on held-out examples, and push them. Goes on where it stopped.

    Several recipes are trained one after another, or --together.
    """
    from training.recipe import PROMPT_KINDS, apply_overrides, load_recipe

    if copy_to and (copy_to.exists() or len(recipes) > 1):
        raise WardrobeError(f"--out {copy_to} must be a folder that is not there, of one recipe.")
    chosen = [apply_overrides(load_recipe(recipe), overrides or []) for recipe in recipes]

    # torch comes in with these: what is wrong with a recipe is said before.
    from training.model import check_runnable, detect_hardware
    from training.processes import is_launched, launch
    from training.results import check_pushable, is_measured_only

    for recipe in chosen:
        check_runnable(recipe.method, detect_hardware())
        if push or promote:
            check_pushable(recipe, promote)
        if is_measured_only(recipe) and (copy_to or forgetting):
            raise WardrobeError(
                f"{recipe.name} is only measured: leave out --out and --forgetting."
            )
        if accelerate_config and (together or recipe.method.kind in PROMPT_KINDS):
            raise WardrobeError("--accelerate-config is for training one adapter at a time.")
    if accelerate_config and not is_launched():
        return launch(accelerate_config, sys.argv[1:])

    def keep(recipe: "Recipe", trained: "TrainedAdapter") -> None:
        if copy_to:
            shutil.copytree(trained.folder, copy_to)
        if push or promote:
            base = known_bases().get(trained.card["base"]["id"])
            alias = PRODUCTION if promote else None
            push_trained(AdapterName.parse(recipe.name), base, trained, home, alias)

    runs = (home or default_home()) / "runs"
    with unwritten_weights(runs):
        if together:
            train_group(context, chosen, runs, keep, forgetting)
        else:
            for recipe in chosen:
                train_one(context, recipe, runs, keep, forgetting)
    return None


@contextmanager
def unwritten_weights(runs: Path) -> "Generator[None]":
    """Say a full disk in a sentence: safetensors does not call it an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise RunFailed(
            f"Weights cannot be written or read in {runs}: {error}. When there is room again, the "
            "same command goes on."
        ) from error


def train_one(
    context: typer.Context,
    recipe: "Recipe",
    runs: Path,
    keep: "Callable[[Recipe, TrainedAdapter], None]",
    forgetting: bool,
) -> None:
    """Train one adapter, or find one prompt; only the first of several processes keeps it."""
    from training.data.load import load_data
    from training.evaluation.memory import remembered
    from training.processes import first_alone, is_first_process
    from training.results import is_measured_only
    from training.train import train as fit

    base = first_alone(lambda: find_base(recipe.base))
    data = first_alone(lambda: load_data(recipe))
    answer = remembered(runs / "base-answers", base, answer_once(context))
    if is_measured_only(recipe):
        tell_measured(recipe, data, base, answer)
    elif is_first_process():
        keep(recipe, specialised(recipe, data, base, runs, answer, forgetting))
    else:
        fit(recipe, data, base, runs, progress=lambda _: None, show=lambda _: None, answer=answer)


def train_group(
    context: typer.Context,
    recipes: "Sequence[Recipe]",
    runs: Path,
    keep: "Callable[[Recipe, TrainedAdapter], None]",
    forgetting: bool,
) -> None:
    """Train adapters over one base in mixed batches; judge and keep those that did not fail.

    One engine judges them all. Raises RunFailed at the end, naming those that failed.
    """
    from training.data.load import load_data
    from training.evaluation.memory import remembered
    from training.screen import progress_bars
    from training.together.train import Job, check_recipes, train_together

    check_recipes(recipes)
    base = find_base(recipes[0].base)
    jobs = [Job(recipe, load_data(recipe)) for recipe in recipes]
    for job in jobs:
        tell_data(job.recipe, job.data)
    answer = remembered(runs / "base-answers", base, answer_once(context))
    with progress_bars() as report, open_engines(context) as engines:
        outcomes = train_together(jobs, base, runs, progress=report, show=show_row, answer=answer)
        answer = remembered(runs / "base-answers", base, engines)
        judged = [
            (job.recipe, evaluated(job.recipe, job.data, base, outcome, answer, report, forgetting))
            for job, outcome in zip(jobs, outcomes, strict=True)
            if not isinstance(outcome, RunFailed)
        ]
    for recipe, trained in judged:
        tell_trained(recipe, trained)
        keep(recipe, trained)
    if failed := [outcome.message for outcome in outcomes if isinstance(outcome, RunFailed)]:
        raise RunFailed(" ".join(failed))


def specialised(
    recipe: "Recipe",
    data: "Data",
    base: BaseModel,
    runs: Path,
    answer: "Answer",
    forgetting: bool,
) -> "TrainedAdapter":
    """Train, or find a prompt, and judge it; tell on the terminal how it went."""
    from training.recipe import PROMPT_KINDS
    from training.screen import progress_bars
    from training.train import train as fit

    tell_data(recipe, data)
    with progress_bars() as report:
        if recipe.method.kind in PROMPT_KINDS:
            trained = prompted(recipe, data, base, runs, answer, report)
        else:
            trained = fit(recipe, data, base, runs, progress=report, show=show_row, answer=answer)
        trained = evaluated(recipe, data, base, trained, answer, report, forgetting)
    tell_trained(recipe, trained)
    return trained


def prompted(
    recipe: "Recipe",
    data: "Data",
    base: BaseModel,
    runs: Path,
    answer: "Answer",
    report: "Report",
) -> "TrainedAdapter":
    """Find a prompt instead of training; show what was measured on the way."""
    from training.fewshot.screen import measured_table
    from training.fewshot.version import make_prompt

    trained = make_prompt(recipe, data, base, runs, answer=answer, progress=report)
    if recipe.method.kind == "fewshot":
        out.print(measured_table(trained.card["lineage"]), soft_wrap=False)
    return trained


def tell_measured(recipe: "Recipe", data: "Data", base: BaseModel, answer: "Answer") -> None:
    from training.fewshot.measure import measure
    from training.fewshot.screen import measured_table
    from training.fewshot.version import facts_of
    from training.screen import progress_bars

    tell_data(recipe, data)
    with progress_bars() as report:
        measured = measure(recipe, data, base, answer=answer, progress=report)
    out.print(measured_table(facts_of(measured)), soft_wrap=False)
    out.print("measured only: examples that depend on the request are no fixed version")


def tell_data(recipe: "Recipe", data: "Data") -> None:
    rows = "pairs" if recipe.preference else "examples"
    sides = ((data.train, f"{rows} to train on"), (data.validation, "to validate"))
    counts = [f"{len(side)} {purpose}" for side, purpose in sides if side]
    out.print(f"{recipe.name}: {', '.join(counts)}, {len(data.held_out)} held out by group")
    if data.duplicates:
        out.print(f"[yellow]{data.duplicates} examples left out: held out too, or repeated[/]")
    if data.near_duplicates:
        out.print(f"[yellow]{data.near_duplicates} examples left out: near another, or judged[/]")


def show_row(sample: "MaskedSample") -> None:
    from training.screen import sample_panel

    out.print(sample_panel(sample), soft_wrap=False)


def tell_trained(recipe: "Recipe", trained: "TrainedAdapter") -> None:
    from training.screen import forgetting_table, score_table

    if trained.dropped:
        limit = recipe.train.max_length
        out.print(f"[yellow]{trained.dropped} examples dropped: over {limit} tokens[/]")
    out.print(score_table(recipe, trained), soft_wrap=False)
    if "forgetting" in trained.card["metrics"]:
        out.print(forgetting_table(trained.card), soft_wrap=False)
    out.print(f"{trained.card['kind']} in {escape(str(trained.folder))}")
    if trained.curve:
        out.print(f"loss curve in {escape(str(trained.curve))}")
    elif trained.card["kind"] != "prompt":
        out.print("no loss curve: pip install 'wardrobe\\[report]' draws one")


def evaluated(
    recipe: "Recipe",
    data: "Data",
    base: BaseModel,
    trained: "TrainedAdapter",
    answer: "Answer",
    report: "Report",
    forgetting: bool = False,
) -> "TrainedAdapter":
    """Complete the card with what is not in it yet: a run found again keeps its verdict."""
    from training.evaluation.judge import judge_forgetting, judge_trained
    from training.model import detect_hardware
    from training.prompt import load_prompter

    known = trained.card["metrics"]
    if known and (not forgetting or "forgetting" in known):
        return trained
    prompter = load_prompter(base.path, recipe.task.system)
    hardware = detect_hardware()
    missing = [] if known else [judge_trained]
    missing += [judge_forgetting] if forgetting else []
    for judge in missing:
        trained = judge(recipe, data, base, trained, prompter, answer, hardware, progress=report)
    return trained


def push_trained(
    name: AdapterName,
    base: BaseModel,
    trained: "TrainedAdapter",
    home: Path | None,
    alias: str | None,
) -> None:
    with open_registry(home) as registry:
        pushed = registry.push(trained.folder, name, base=base.id, actor=actor())
    said = "pushed" if pushed.created else "is there already:"
    out.print(f"{said} [bold]{pushed.version.ref.label}[/]", highlight=False)
    for _, text in pushed.warnings:
        out.print(f"[yellow]{escape(text)}[/]", highlight=False)
    if alias:
        label, reason = pushed.version.ref.label, "passed its gate after training"
        registry_commands.promote(label, reason=reason, alias=alias, home=home)
