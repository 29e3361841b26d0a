"""wardrobe extract and evaluate: work on versions that are there."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from registry.adapter import Selector
from registry.base import BaseModel
from registry.commands import Home, Json, clear_errors, open_registry
from registry.errors import WardrobeError
from registry.home import default_home
from registry.screen import print_json
from registry.store import Registry
from training.commands.bases import find_base
from training.commands.engines import answer_once
from training.commands.options import Overrides, RecipeFolder
from training.commands.train import evaluated, push_trained

if TYPE_CHECKING:
    from training.evaluation.evaluate import Variant
    from training.recipe import Recipe
    from training.train import TrainedAdapter

# torch and transformers are imported where a command needs them, so that `--help` answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False)
out = Console(soft_wrap=True)


@app.command()
@clear_errors()
def extract(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A run folder of a full fine-tune, or NAMESPACE/NAME@vN of one.")
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, max=256, help="Of every module, at most. Default: 64.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of a module's change to keep; sets its rank."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Judge the adapter as this recipe says.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Store the adapter as a version.")] = False,
    copy_to: Annotated[
        Path | None, typer.Option("--out", help="Also write the adapter to this new folder.")
    ] = None,
    home: Home = None,
) -> None:
    """Make a LoRA adapter of a full fine-tune by SVD, so that it is worn over the frozen base."""
    from training.data.load import load_data
    from training.evaluation.memory import remembered
    from training.extract import Extraction, FineTune
    from training.extract import extract as make_adapter
    from training.recipe import load_recipe
    from training.screen import extraction_table, progress_bars, score_table

    if copy_to and copy_to.exists():
        raise WardrobeError(f"--out {copy_to} is there already. Name a folder that is not.")
    chosen = load_recipe(recipe) if recipe else None
    runs = (home or default_home()) / "runs"
    with open_registry(home) as registry, registry.staging() as staging, progress_bars() as report:
        tuned = FineTune.find(source, registry, staging)
        base = find_base(tuned.base_id)
        made = make_adapter(tuned, base, runs, Extraction.of(rank, energy), progress=report)
        if chosen:
            made = unjudged_for(chosen, made)
            answer = remembered(runs / "base-answers", base, answer_once(context))
            made = evaluated(chosen, load_data(chosen), base, made, answer, report)
    out.print(extraction_table(made.card), soft_wrap=False)
    if chosen:
        out.print(score_table(chosen, made), soft_wrap=False)
    out.print(f"adapter in {escape(str(made.folder))}")
    if copy_to:
        shutil.copytree(made.folder, copy_to)
    if push:
        push_trained(tuned.name, base, made, home, alias=None)


def unjudged_for(recipe: "Recipe", made: "TrainedAdapter") -> "TrainedAdapter":
    """Forget a verdict, which may be another recipe's. Raises WardrobeError for another prompt."""
    system = made.card.get("prompt", {}).get("system", "")
    if recipe.task.system != system:
        raise WardrobeError(
            f"--recipe asks under the system prompt {recipe.task.system!r}, and the fine-tune is "
            f"served with {system!r}: the verdict would be of another version."
        )
    return replace(made, card=made.card | {"metrics": {}})


@app.command()
@clear_errors()
def evaluate(
    context: typer.Context,
    recipe: RecipeFolder,
    selectors: Annotated[
        list[str], typer.Argument(metavar="SELECTOR…", help="Stored versions, such as NAME@v3.")
    ],
    overrides: Overrides = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Judge stored versions, and the base, on a recipe's held-out side; compare them in pairs."""
    from training.data.load import load_data
    from training.evaluation.evaluate import Variant, near_duplicates
    from training.evaluation.evaluate import evaluate as judge
    from training.evaluation.memory import remembered
    from training.evaluation.standings import stand
    from training.prompt import load_prompter
    from training.recipe import apply_overrides, load_recipe
    from training.screen import pair_table, progress_bars, standings_table

    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    base = find_base(chosen.base)
    data = load_data(chosen)
    prompter = load_prompter(base.path, chosen.task.system)
    answer = remembered(
        (home or default_home()) / "runs" / "base-answers", base, answer_once(context)
    )
    with open_registry(home) as registry, registry.staging() as staging, progress_bars() as report:
        stored = [stored_variant(registry, base, text, staging) for text in selectors]
        by_name = {variant.name: variant for variant in stored}  # one row for each version
        variants = [Variant("base", base, chosen.task.system), *by_name.values()]
        evaluations = judge(
            chosen,
            data.held_out,
            variants,
            prompter,
            answer,
            progress=report,
            near=near_duplicates(data),
        )
    standings = stand(chosen.task.metric, evaluations)
    if as_json:
        return print_json(standings.facts())
    out.print(standings_table(chosen, standings), soft_wrap=False)
    out.print(pair_table(standings), soft_wrap=False)
    return None


def stored_variant(registry: Registry, base: BaseModel, selector: str, staging: Path) -> "Variant":
    """Return a stored version as it answers: with its own system prompt and examples.

    A whole model is written out under `staging`.
    """
    from training.evaluation.evaluate import Variant

    version = registry.resolve(Selector.parse(selector))
    if version.base_id != base.id:
        raise WardrobeError(
            f"{version.ref.label} was made for {version.base_id}, and the recipe's base is "
            f"{base.id}: they cannot be judged on one model."
        )
    label, system = version.ref.label, version.system_prompt
    if version.is_whole:
        folder = staging / version.digest
        if not folder.exists():
            registry.pull(Selector.parse(selector), folder)
        return Variant.trained(label, base, system, folder)
    worn = registry.fetch(version.adapter) if version.adapter else None
    return Variant(label, base, system, worn, version.examples)
