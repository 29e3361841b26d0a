"""The command line: the composition root, the only module that may import all three packages."""

import logging
import shutil
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from registry import commands as registry_commands
from registry.adapter import PRODUCTION, AdapterName, Selector
from registry.base import BaseModel
from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.errors import WardrobeError
from registry.home import default_home
from registry.screen import print_json
from registry.store import Registry
from serving.experiments.commands import app as experiment_app
from serving.tenants.commands import app as tenants_app
from serving.tenants.commands import key_app
from training import commands as training_commands
from training.commands import Overrides, RecipeFolder, find_base, known_bases, pull
from training.errors import RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from training.batches import MaskedSample
    from training.comparison.bench import Bench
    from training.data.examples import Data
    from training.evaluation.evaluate import Answer, Ask, Variant
    from training.progress import Report, Stage
    from training.recipe import Recipe
    from training.train import TrainedAdapter

# torch, transformers and litestar are imported where a command needs them, so that `wardrobe list`
# answers at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="One frozen base model, a wardrobe of adapters: train, version, serve, hot-swap.",
)
app.add_typer(registry_commands.app)
app.add_typer(training_commands.app)
app.add_typer(tenants_app)
base_app = typer.Typer(no_args_is_help=True, help="Base models on this machine.")
app.add_typer(base_app, name="base")
app.add_typer(key_app, name="key")
app.add_typer(experiment_app, name="experiment")

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
Minutes = Annotated[
    float | None, typer.Option(min=0.5, help="Leave out, and name, what does not fit in.")
]
out = Console(soft_wrap=True)


@base_app.command("pull")
@clear_errors()
def base_pull(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="A Hub id, a local folder, a .gguf file, or a catalogue name."
        ),
    ] = DEFAULT_BASE,
    base_id: Annotated[
        str | None,
        typer.Option("--id", help="What a folder or file is called; default: local/ and its name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch a base model and keep it as plain safetensors."""
    base = pull(spec, base_id) if base_id else find_base(spec)
    if as_json:
        return print_json(base)
    out.print(f"[bold]{base.id}[/] sha256:{base.fingerprint[:12]} in {escape(str(base.path))}")
    return None


@base_app.command("list")
@clear_errors()
def base_list(as_json: Json = False) -> None:
    """List the base models on this machine."""
    bases = known_bases().list()
    if as_json:
        return print_json(bases)
    table = Table("fingerprint")
    table.add_column("id", overflow="fold")
    table.add_column("path", overflow="fold")
    for base in bases:
        table.add_row(base.fingerprint[:12], base.id, escape(str(base.path)))
    out.print(table, soft_wrap=False)
    return None


@app.command()
@clear_errors()
def train(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Folders with a recipe.toml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
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
    from training.model import check_runnable, detect_hardware
    from training.processes import is_launched, launch
    from training.recipe import PROMPT_KINDS, apply_overrides, load_recipe
    from training.results import check_pushable, is_measured_only

    if copy_to and (copy_to.exists() or len(recipes) > 1):
        raise WardrobeError(f"--out {copy_to} must be a folder that is not there, of one recipe.")
    chosen = [apply_overrides(load_recipe(recipe), overrides or []) for recipe in recipes]
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
    if together:
        train_group(chosen, runs, keep, forgetting)
    else:
        for recipe in chosen:
            train_one(recipe, runs, keep, forgetting)
    return None


def train_one(
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
    answer = remembered(runs / "base-answers", base, answer_offline)
    if is_measured_only(recipe):
        tell_measured(recipe, data, base, answer)
    elif is_first_process():
        keep(recipe, specialised(recipe, data, base, runs, answer, forgetting))
    else:
        fit(recipe, data, base, runs, progress=lambda _: None, show=lambda _: None, answer=answer)


def train_group(
    recipes: "Sequence[Recipe]",
    runs: Path,
    keep: "Callable[[Recipe, TrainedAdapter], None]",
    forgetting: bool,
) -> None:
    """Train adapters over one base in mixed batches; judge and keep those that did not fail.

    One engine judges them all. Raises RunFailed at the end, naming those that failed.
    """
    from serving.offline import OfflineEngines
    from training.data.load import load_data
    from training.evaluation.memory import remembered
    from training.screen import progress_bars
    from training.together.train import Job, check_recipes, train_together

    check_recipes(recipes)
    base = find_base(recipes[0].base)
    jobs = [Job(recipe, load_data(recipe)) for recipe in recipes]
    for job in jobs:
        tell_data(job.recipe, job.data)
    answer = remembered(runs / "base-answers", base, answer_offline)
    with progress_bars() as report, closing(OfflineEngines()) as engines:
        outcomes = train_together(jobs, base, runs, progress=report, show=show_row, answer=answer)
        answer = remembered(runs / "base-answers", base, engines.answer)
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


def tell_data(recipe: "Recipe", data: "Data") -> None:
    sides = ((data.train, "examples to train on"), (data.validation, "to validate"))
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


def answer_offline(
    model: BaseModel,
    asks: "Sequence[Ask]",
    max_new_tokens: int,
    done: "Callable[[int], None]",
) -> list[list[int]]:
    """Answer on the serving engine, which is gone afterwards: its memory is free for training."""
    from serving.offline import OfflineEngines
    from training.evaluation.peft_answers import with_peft

    with closing(OfflineEngines()) as engines:
        return with_peft(engines.answer)(model, asks, max_new_tokens, done)


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


@app.command()
@clear_errors()
def extract(
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
            answer = remembered(runs / "base-answers", base, answer_offline)
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


@app.command()
@clear_errors()
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="A folder with a recipe.toml.")],
    selectors: Annotated[
        list[str], typer.Argument(metavar="SELECTOR…", help="Stored versions, such as NAME@v3.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
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
    answer = remembered((home or default_home()) / "runs" / "base-answers", base, answer_offline)
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


@app.command()
@clear_errors()
def compare(
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
    with bench_for(chosen, plan.minutes, "compare", home) as bench:
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
    with bench_for(chosen, minutes, "sweep", home) as bench:
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
    recipe: "Recipe", minutes: float | None, stage: "Stage", home: Path | None
) -> "Generator[Bench, None, None]":
    """Open what a comparison or a sweep trains and asks with."""
    from serving.offline import OfflineEngines
    from training.comparison.bench import Bench
    from training.data.load import load_data
    from training.evaluation.peft_answers import with_peft
    from training.model import detect_hardware
    from training.screen import progress_bars

    place = home or default_home()
    base, data = find_base(recipe.base), load_data(recipe)
    with progress_bars() as report, closing(OfflineEngines()) as engines:
        yield Bench(
            recipe,
            data,
            base,
            runs=place / "runs",
            folder=place / "comparisons",
            hardware=detect_hardware(),
            answer=with_peft(engines.answer),
            progress=report,
            minutes=minutes,
            stage=stage,
        )


@app.command()
@clear_errors()
def serve(
    base: Annotated[
        str, typer.Option(help="Base model; pulled when it is not here.")
    ] = DEFAULT_BASE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="auto takes bfloat16 where the hardware has it."),
    ] = "auto",
    operators: Annotated[
        Literal["auto", "torch"],
        typer.Option(
            envvar="WARDROBE_OPERATORS",
            help="auto compiles the CPU's forward pass on first use; torch never does.",
        ),
    ] = "auto",
    auth: Annotated[
        bool, typer.Option("--auth/--no-auth", help="--no-auth only works on loopback.")
    ] = True,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences in one batch.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=0, help="More that may wait; then 429.")] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(min=16, help="Tokens of prompt and answer together.")
    ] = None,
    max_batched_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of one step: prompts go in chunks of it.")
    ] = 512,
    adapter_slots: Annotated[
        int, typer.Option(min=1, help="Adapters that can be worn at once.")
    ] = 32,
    max_lora_rank: Annotated[int, typer.Option(min=1, max=256, help="Highest rank.")] = 256,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for running streams after SIGTERM.")
    ] = 30.0,
    home: Home = None,
) -> None:
    """Serve the base and every adapter of the registry over HTTP."""
    from serving.api.server import serve as serve_http
    from serving.api.settings import ServerSettings
    from serving.engine.engine import TorchEngine
    from serving.engine.settings import EngineSettings
    from serving.tenants.keys import ensure_operator_key
    from serving.tokens import Tokens

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = ServerSettings(host=host, port=port, auth=auth, drain_timeout=drain_timeout)
    try:
        engine_settings = EngineSettings(
            device=device,
            dtype=dtype,
            operators=operators,
            max_running=max_running,
            max_waiting=max_waiting,
            max_model_len=max_model_len,
            max_batched_tokens=max_batched_tokens,
            adapter_slots=adapter_slots,
            max_lora_rank=max_lora_rank,
            threads=threads,
        )
    except ValueError as error:  # two options that contradict each other
        raise WardrobeError(str(error)) from error
    model = find_base(base)
    with open_registry(home) as registry:
        if auth and (key := ensure_operator_key(registry)):
            out.print(f"operator key, shown only now: [bold]{key}[/]", highlight=False)
        engine = TorchEngine.create(model, registry.fetch, engine_settings)
        serve_http(
            settings,
            registry,
            engine,
            model,
            Tokens(model.path),
            on_start=lambda url: out.print(f"serving {model.id} at [bold]{url}[/]"),
        )


def main() -> None:
    app()


if __name__ == "__main__":
    main()
