"""The commands of shadows: start, stop, status, report; and replay."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.home import default_home
from registry.screen import print_json, shown
from serving.shadow.comparison import ComparisonInvalid
from serving.shadow.moves import start
from serving.shadow.report import describe, summarize
from serving.shadow.store import Comparisons

app = typer.Typer(no_args_is_help=True, help="A candidate beside production, answering nobody.")

Name = Annotated[str, typer.Argument(help="NAMESPACE/NAME whose production is mirrored.")]
Candidate = Annotated[str, typer.Option("--candidate", help="@vN, a selector, or base.")]


@contextmanager
def open_comparisons(home: Path | None) -> Generator[Comparisons]:
    with Comparisons(home or default_home()) as store:
        yield store


@app.command("start")
@clear_errors()
def start_shadow(
    name: Name,
    candidate: Candidate,
    share: Annotated[float, typer.Option(help="Of the units whose requests are mirrored.")] = 0.1,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Mirror a share of the production traffic; running servers take it up within seconds."""
    with open_registry(home) as registry, open_comparisons(home) as store:
        made = start(registry, store, AdapterName.parse(name), candidate, share, actor())
    if as_json:
        return print_json(summarize(made))
    facts = summarize(made)
    print(
        f"{made.id} mirrors {100 * share:g} % of {name} to {facts['candidate']['version']}, beside "
        f"{facts['production']['version']}"
    )
    return print(f"  wardrobe shadow report {name}")


@app.command("stop")
@clear_errors()
def stop_shadow(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why; it stays beside the numbers.")] = "by hand",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Mirror no more; the pairs stay."""
    with open_comparisons(home) as store:
        stopped = store.stop(store.latest_shadow(AdapterName.parse(name)), reason)
    if as_json:
        return print_json(summarize(stopped))
    return print(f"{stopped.id} is stopped: {stopped.reason}")


@app.command("status")
@clear_errors()
def status(home: Home = None, as_json: Json = False) -> None:
    """List the shadows, oldest first."""
    with open_comparisons(home) as store:
        found = [{**summarize(c), "pairs": store.size(c)} for c in store.find()]
    if as_json:
        return print_json(found)
    table = Table("id", "adapter", "production", "candidate", "share", "state", "pairs")
    for facts in found:
        versions = (facts["production"]["version"], facts["candidate"]["version"])
        state = f"{facts['state']} {facts['reason']}".strip()
        row = (facts["id"], facts["name"], *versions, f"{100 * facts['share']:g} %", state)
        table.add_row(*map(shown, row), str(facts["pairs"]))
    return Console().print(table)


@app.command("report")
@clear_errors()
def report(name: Name, home: Home = None, as_json: Json = False) -> None:
    """Say how the candidate's answers differ from production's. Look as often as you like."""
    with open_comparisons(home) as store:
        facts = describe(store, store.latest_shadow(AdapterName.parse(name)))
    if as_json:
        return print_json(facts)
    return print_report(facts)


@clear_errors()
def replay(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME whose production is compared with.")],
    candidate: Candidate,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="JSON lines with messages or prompt, or an exported log."),
    ] = None,
    from_logs: Annotated[
        bool, typer.Option("--from-logs", help="The latest logged prompts of this adapter.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The most prompts.")] = 1000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 256,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Run prompts of old through production and a candidate, and say how the answers differ.

    Nobody is served. Interrupted, the same command goes on where it was.
    """
    if from_logs == (file is not None):
        raise ComparisonInvalid("Say where the prompts are from: --from-logs or --file.")
    adapter = AdapterName.parse(name)

    from serving.shadow.asks import Source  # torch comes with it
    from serving.shadow.replay import replay_all

    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with open_registry(home) as registry, open_comparisons(home) as store:
        source = (
            Source.of_logs(registry.home, adapter, limit)
            if file is None
            else Source.of_file(file, limit)
        )
        with bar:
            task = bar.add_task("replay", total=None)
            comparison, skipped = replay_all(
                registry,
                store,
                adapter,
                candidate,
                source,
                max_tokens,
                actor(),
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        facts = describe(store, comparison, skipped)
    if as_json:
        return print_json(facts)
    return print_report(facts)


def print_report(facts: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"[bold]{facts['id']}[/]: {facts['candidate']['version']} beside "
        f"{facts['production']['version']}, {facts['state']} {shown(facts['reason'])}".rstrip()
    )
    for sentence in facts["sentences"]:
        console.print(f"  {sentence}")
    if any(measure["low"] is not None for measure in facts["measures"]):
        console.print("[dim]In brackets: 95 % intervals that hold at every look together.[/]")
