"""wardrobe compare and sweep: many runs of one recipe beside each other."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from registry.adapter import AdapterName
from registry.commands import Home, Json, clear_errors
from registry.home import default_home
from registry.screen import print_json
from training.commands.bases import find_base
from training.commands.engines import open_engines
from training.commands.options import Minutes, Overrides, RecipeFolder
from training.commands.train import evaluated, push_trained

if TYPE_CHECKING:
    from collections.abc import Generator

    from training.comparison.bench import Bench
    from training.progress import Stage
    from training.recipe import Recipe

# torch and transformers are imported where a command needs them, so that `--help` answers at once.

app = typer.Typer(no_args_is_help=True, add_completion=False)
out = Console(soft_wrap=True)


@app.command()
@clear_errors()
def compare(
    context: typer.Context,
    recipe: RecipeFolder,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(metavar="A,B,…", help="Which to compare; `all` names every one.")
    ] = "",
    seeds: Annotated[
        int, typer.Option(min=1, max=20, help="Training seeds; 3 or more speak for the methods.")
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look in 8 minutes: short runs, few items.")
    ] = False,
    minutes: Minutes = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compare prompts, LoRA, full fine-tuning and more on one recipe. Goes on where it stopped."""
    from training.comparison.compare import compare as run
    from training.comparison.page import write_report
    from training.comparison.plan import make_plan
    from training.comparison.screen import comparison_summary

    chosen, plan = make_plan(
        recipe, overrides or [], methods, seeds=seeds, quick=quick, minutes=minutes
    )
    with bench_for(context, chosen, plan.minutes, "compare", home) as bench:
        found = run(bench, plan)
        page = write_report(bench.folder / plan.name(chosen), found)
    if as_json:
        return print_json(found)
    out.print(comparison_summary(found), soft_wrap=False)
    out.print(f"report in {escape(str(page))}")
    return None


@app.command()
@clear_errors()
def sweep(
    context: typer.Context,
    recipe: RecipeFolder,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=A,B|LOW..HIGH", help="What to try; may be repeated."),
    ],
    search: Annotated[
        Literal["grid", "random", "optuna"], typer.Option(help="In which order it is tried.")
    ] = "grid",
    trials: Annotated[
        int | None, typer.Option(min=1, help="At most so many. Default: a grid all, others 20.")
    ] = None,
    minutes: Minutes = None,
    push: Annotated[
        bool, typer.Option("--push", help="Store the best; `candidate` points to it if it passed.")
    ] = False,
    home: Home = None,
) -> None:
    """Try other keys of a recipe; validation chooses the best. Goes on where it stopped."""
    from training.comparison.plan import read_recipe
    from training.comparison.screen import sweep_summary
    from training.comparison.space import chooser, count_trials, parse_space
    from training.comparison.sweep import sweep as run
    from training.screen import score_table

    chosen, space = parse_space(read_recipe(recipe)[0], settings)
    total = count_trials(space, search, trials)
    choose = chooser(space, search, trials, chosen.seed)
    with bench_for(context, chosen, minutes, "sweep", home) as bench:
        found = run(bench, space, search, choose, total)
        best = bench.again(found.best.cell)
        recipe_of_best = found.best.cell.recipe
        best = evaluated(recipe_of_best, bench.data, bench.base, best, bench.answer, bench.progress)
    out.print(sweep_summary(found, bench.left_out), soft_wrap=False)
    out.print(score_table(recipe_of_best, best), soft_wrap=False)
    out.print(f"adapter in {escape(str(best.folder))}")
    if push:
        push_trained(AdapterName.parse(chosen.name), bench.base, best, home, alias="candidate")


@contextmanager
def bench_for(
    context: typer.Context,
    recipe: "Recipe",
    minutes: float | None,
    stage: "Stage",
    home: Path | None,
) -> "Generator[Bench, None, None]":
    """Open what a comparison or a sweep trains and asks with."""
    from training.comparison.bench import Bench
    from training.data.load import load_data
    from training.model import detect_hardware
    from training.screen import progress_bars

    place = home or default_home()
    base, data = find_base(recipe.base), load_data(recipe)
    with progress_bars() as report, open_engines(context) as answer:
        yield Bench(
            recipe,
            data,
            base,
            runs=place / "runs",
            folder=place / "comparisons",
            hardware=detect_hardware(),
            answer=answer,
            progress=report,
            minutes=minutes,
            stage=stage,
        )
