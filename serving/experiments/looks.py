"""The commands that look at experiments: list, status, report, power; and what people showed."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, clear_errors
from registry.home import default_home
from registry.screen import print_json, shown
from serving.experiments.page import values_of, write_page
from serving.experiments.power import estimate
from serving.experiments.report import describe, summarize
from serving.experiments.store import Experiments

app = typer.Typer()

Id = Annotated[str, typer.Argument(metavar="ID", help="As `experiment list` shows it.")]


@contextmanager
def open_experiments(home: Path | None) -> Generator[Experiments]:
    with Experiments(home or default_home()) as store:
        yield store


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
        row = (shown(reading["metric"]), roles[reading["metric"]], reading["arm"])
        table.add_row(*row, *values_of(reading))
    return table


@app.command("report")
@clear_errors()
def report(
    experiment_id: Id,
    out: Annotated[
        Path | None, typer.Option("--out", help="A file, instead of the screen.")
    ] = None,
    home: Home = None,
) -> None:
    """Write all that is known of an experiment as a page of Markdown."""
    with open_experiments(home) as store:
        page = write_page(describe(store, store.get(experiment_id)))
    if out is None:
        return print(page, end="")
    out.write_text(page)
    return print(f"{out} is written")


@app.command("power")
@clear_errors()
def power(
    experiment_id: Id,
    units_per_day: Annotated[float, typer.Option(help="That the adapter sees in all.")],
    effect: Annotated[
        float | None, typer.Option(help="To be shown. Default: the least effect of the design.")
    ] = None,
    baseline: Annotated[
        float | None, typer.Option(help="The control's share, of a binary metric.")
    ] = None,
    deviation: Annotated[
        float | None, typer.Option(help="A unit's standard deviation, of any other metric.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Say before the start how many units an effect takes, and how many days."""
    with open_experiments(home) as store:
        found = estimate(
            store.get(experiment_id),
            units_per_day=units_per_day,
            effect=effect,
            baseline=baseline,
            deviation=deviation,
        )
    if as_json:
        return print_json(asdict(found))
    return print(found.sentence)


def from_feedback(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME whose answers were corrected.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.jsonl", help="Is written anew.")],
    home: Home = None,
) -> None:
    """Write the answers that people gave instead as rows of a recipe, with where they are from."""
    adapter, rows, last = AdapterName.parse(name), 0, 0
    with open_experiments(home) as store, out.open("wb") as file:
        while given := store.demonstrations(adapter, last):
            file.writelines(msgspec.json.encode(one.row()) + b"\n" for one in given)
            rows, last = rows + len(given), given[-1].seq
    print(f"{out}: {rows} rows" + ("" if rows else f"; nobody demonstrated an answer of {adapter}"))
