"""The commands of experiments: create, start, ramp, pause, stop, list, status."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.home import default_home
from registry.screen import print_json, shown
from serving.experiments.design import check_policy, make_arms, make_metrics
from serving.experiments.moves import move
from serving.experiments.report import describe, summarize
from serving.experiments.store import Experiments

app = typer.Typer(no_args_is_help=True, help="A/B tests between versions, on live traffic.")

Id = Annotated[str, typer.Argument(metavar="ID", help="As `experiment list` shows it.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the log.")]
METRIC = "NAME:KIND[:lower], KIND one of binary, total, average; or errors, latency, tokens."


@contextmanager
def open_experiments(home: Path | None) -> Generator[Experiments]:
    with Experiments(home or default_home()) as store:
        yield store


@app.command("create")
@clear_errors()
def create(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME whose production is split.")],
    treatments: Annotated[
        list[str], typer.Option("--treatment", help="@vN, a selector, or base; may be repeated.")
    ],
    metric: Annotated[str, typer.Option("--metric", help=f"What decides. {METRIC}")],
    guardrails: Annotated[
        list[str] | None,
        typer.Option("--guardrail", help="What must not get worse. Default: errors."),
    ] = None,
    signals: Annotated[
        list[str] | None, typer.Option("--signal", help="What is only shown.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of the treatments together.")] = 0.5,
    alpha: Annotated[float, typer.Option(help="Chance of a false winner, all looks.")] = 0.05,
    on_win: Annotated[
        Literal["tell", "promote"], typer.Option(help="What a winner leads to.")
    ] = "tell",
    blind: Annotated[bool, typer.Option("--blind", help="Answers do not name the arm.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write an experiment down. The control is what production is now."""
    adapter = AdapterName.parse(name)
    metrics = make_metrics(metric, guardrails or ["errors"], signals or [])
    with open_registry(home) as registry, open_experiments(home) as store:
        arms = make_arms(registry, adapter, treatments, share)
        check_policy(arms, adapter, alpha, on_win)
        made = store.create(
            adapter, arms, metrics, alpha=alpha, on_win=on_win, blind=blind, actor=actor()
        )
    if as_json:
        return print_json(summarize(made))
    print(f"{made.id} is written. Run it with:")
    return print(f"  wardrobe experiment start {made.id} --exposure 0.1")


def _move(
    experiment_id: str,
    action: str,
    exposure: float | None,
    reason: str,
    home: Path | None,
    as_json: bool,
) -> None:
    with open_experiments(home) as store:
        found = store.get(experiment_id)
        moved = move(store, found, action, exposure=exposure, actor=actor(), reason=reason)
    if as_json:
        return print_json(summarize(moved))
    return print(f"{moved.id} is {moved.state}, exposure {100 * moved.exposure:g} %")


@app.command("start")
@clear_errors()
def start(
    experiment_id: Id,
    exposure: Annotated[
        float | None, typer.Option(help="Share of units that take part, 0 to 1.")
    ] = None,
    reason: Reason = "started",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Split the traffic; running servers take it up once every arm is loaded and checked."""
    _move(experiment_id, "start", exposure, reason, home, as_json)


@app.command("ramp")
@clear_errors()
def ramp(
    experiment_id: Id,
    exposure: Annotated[float, typer.Option(help="The new share of units, above the old one.")],
    reason: Reason = "ramped",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let more units take part; none changes its arm."""
    _move(experiment_id, "ramp", exposure, reason, home, as_json)


@app.command("pause")
@clear_errors()
def pause(experiment_id: Id, reason: Reason, home: Home = None, as_json: Json = False) -> None:
    """Send everybody to production; what was counted stays."""
    _move(experiment_id, "pause", None, reason, home, as_json)


@app.command("stop")
@clear_errors()
def stop(experiment_id: Id, reason: Reason, home: Home = None, as_json: Json = False) -> None:
    """End it for good."""
    _move(experiment_id, "stop", None, reason, home, as_json)


@app.command("list")
@clear_errors()
def list_experiments(home: Home = None, as_json: Json = False) -> None:
    """List the experiments, oldest first."""
    with open_experiments(home) as store:
        found = store.find()
    if as_json:
        return print_json([summarize(experiment) for experiment in found])
    table = Table("id", "adapter", "state", "exposure", "decides")
    for e in found:
        row = (e.id, str(e.name), e.state, f"{100 * e.exposure:g} %", e.primary.name)
        table.add_row(*row)
    return Console().print(table)


@app.command("status")
@clear_errors()
def status(experiment_id: Id, home: Home = None, as_json: Json = False) -> None:
    """Show the numbers as they are now, what they say, and every decision so far.

    Look as often as you like: the intervals hold for all looks together.
    """
    with open_experiments(home) as store:
        facts = describe(store, store.get(experiment_id))
    if as_json:
        return print_json(facts)
    console = Console(soft_wrap=True)
    console.print(
        f"[bold]{facts['id']}[/] on {facts['name']}: {facts['state']}, "
        f"exposure {100 * facts['exposure']:g} %"
    )
    console.print(_arms_table(facts))
    console.print(_metrics_table(facts))
    console.print(f"[bold]{shown(facts['sentence'])}[/]")
    for note in facts["notes"]:
        console.print(f"[yellow]{shown(note)}[/]")
    for line in facts["decisions"]:
        said = shown(f"{line['at'][:19]}  {line['action']} by {line['actor']}  {line['reason']}")
        console.print(f"[dim]{said}[/]")
    return None


def _arms_table(facts: dict[str, Any]) -> Table:
    table = Table("arm", "version", "share", "units", "answers")
    for number, arm in enumerate(facts["arms"]):
        counted = (str(facts["units"][number]), str(facts["answers"][number]))
        table.add_row(arm["label"], shown(arm["version"]), f"{arm['share']:g}", *counted)
    return table


def _metrics_table(facts: dict[str, Any]) -> Table:
    roles = {metric["name"]: metric["role"] for metric in facts["metrics_declared"]}
    table = Table("metric", "role", "arm", "control", "arm's", "difference at every look")
    for reading in facts["metrics"]:
        span = "collecting"
        if not reading["collecting"]:
            span = f"{reading['difference']:+.4g} ({reading['low']:+.4g} to {reading['high']:+.4g})"
        values = (f"{reading['control']:.4g}", f"{reading['treated']:.4g}", span)
        table.add_row(shown(reading["metric"]), roles[reading["metric"]], reading["arm"], *values)
    return table
