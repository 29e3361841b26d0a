"""wardrobe data: check, split and generate the rows a recipe trains on."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from registry.commands import Json, clear_errors
from registry.errors import WardrobeError
from registry.screen import print_json, shown
from training.commands.bases import find_base
from training.commands.options import Overrides, RecipeFolder

# torch and transformers are imported where a command needs them, so that `--help` answers at once.

app = typer.Typer(no_args_is_help=True, help="The rows a recipe trains on: check, split, generate.")

out = Console(soft_wrap=True)


@app.command("check")
@clear_errors()
def data_check(
    recipe: RecipeFolder,
    overrides: Overrides = None,
    card: Annotated[
        Path | None,
        typer.Option(
            "--card",
            exists=True,
            dir_okay=False,
            help="A wardrobe.json whose examples may leak too.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 on warnings as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List everything that is wrong with a recipe's data; exit with 1 on an error."""
    from training.data.difficulty import difficulty_of
    from training.data.inspection import inspect_data, read_shots
    from training.data.screen import inspection_lines
    from training.recipe import apply_overrides, load_recipe
    from training.screen import progress_bars

    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    base = find_base(chosen.base)
    with progress_bars() as report:
        difficulty = difficulty_of(base, chosen.task.system, report)
        shots = read_shots(card) if card else ()
        inspection, _ = inspect_data(chosen, base.path, report, difficulty, shots)
    if as_json:
        print_json(inspection)
    else:
        for line in inspection_lines(inspection):
            out.print(line, highlight=False)
    if inspection.errors or (strict and inspection.findings):
        raise typer.Exit(1)


@app.command("split")
@clear_errors()
def data_split(
    recipe: RecipeFolder,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Write the sides of a recipe's data, as selected and checked, with a data card."""
    from training.data.difficulty import difficulty_of
    from training.data.folder import refuse_folder, write_folder
    from training.data.inspection import inspect_data
    from training.data.screen import inspection_lines
    from training.recipe import apply_overrides, load_recipe
    from training.screen import progress_bars

    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    refuse_folder(folder)
    base = find_base(chosen.base)
    with progress_bars() as report:
        difficulty = difficulty_of(base, chosen.task.system, report)
        inspection, data = inspect_data(chosen, base.path, report, difficulty)
    if data is None or inspection.errors:
        for line in inspection_lines(inspection):
            out.print(line, highlight=False)
        raise typer.Exit(1)
    card = write_folder(folder, chosen, base, data, inspection)
    if as_json:
        return print_json(card)
    for name, facts in card["files"].items():
        out.print(f"{shown(str(folder / name))}: {facts['rows']:,} rows", highlight=False)
    out.print(f"{shown(str(folder / 'README.md'))} says what they are", highlight=False)
    return None


@app.command("generate")
@clear_errors()
def data_generate(
    recipe: RecipeFolder,
    out_file: Annotated[
        Path, typer.Option("--out", metavar="FILE.jsonl", help="New, or one to go on with.")
    ],
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows FILE is to have.")],
    how: Annotated[
        Literal["templates", "paraphrase", "self-instruct"],
        typer.Option("--how", help="paraphrase and self-instruct ask a model."),
    ],
    templates: Annotated[
        Path | None, typer.Option("--templates", metavar="FILE.toml", help="For --how templates.")
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="OPENAI_BASE_URL", help="An OpenAI-compatible endpoint.")
    ] = "http://127.0.0.1:8000/v1",
    key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Its key; best in the environment.")
    ] = "none",
    model: Annotated[str, typer.Option(help="The model to ask.")] = "base",
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other rows.")] = 0,
    near: Annotated[
        float,
        typer.Option(
            min=0.1, max=1, help="Rows this alike to one in training are refused; 1: equal grams."
        ),
    ] = 0.6,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make new training rows that pass the checks; none is near a held-out row."""
    from training.data.generate import REASONS, Filter, generate
    from training.data.journal import Journal
    from training.data.load import load_data
    from training.data.proposals import by_paraphrase, by_self_instruct, from_templates
    from training.data.templates import load_templates
    from training.prompt import load_prompter
    from training.recipe import apply_overrides, load_recipe
    from training.screen import progress_bars

    if (how == "templates") != (templates is not None):
        raise WardrobeError("--how templates and --templates FILE.toml need each other.")
    chosen = apply_overrides(load_recipe(recipe), overrides or [])
    data = load_data(chosen)
    facts = {"how": how, "seed": seed, "near": near, "data_sha256": data.digest}
    if templates is not None:
        propose = from_templates(load_templates(templates), seed)
        facts["templates_sha256"] = hashlib.sha256(templates.read_bytes()).hexdigest()
    else:
        from training.data.endpoint import Endpoint

        endpoint = Endpoint(url, key, model, temperature)
        facts |= {"model": model, "temperature": temperature}
        if how == "paraphrase":
            propose = by_paraphrase(data.train, endpoint, seed)
        else:
            propose = by_self_instruct(data.train, endpoint, chosen.task, seed)
    prompter = load_prompter(find_base(chosen.base).path, chosen.task.system)
    accept = Filter(chosen, data, prompter, near)
    with progress_bars() as report:
        made = generate(Journal(out_file, facts), rows, propose, accept, report)
    if as_json:
        print_json(made)
    else:
        out.print(f"{made.accepted:,} rows in {shown(str(out_file))}", highlight=False)
        for reason, count in made.rejected.items():
            out.print(f"[dim]{count:,} rejected: they {REASONS[reason]}[/]", highlight=False)
    if not made.complete:
        out.print("[yellow]Nothing new came any more. Try another --seed, or more templates.[/]")
        raise typer.Exit(1)
