"""The commands of the registry: push, list, show, promote, rollback, history, pull, verify."""

import getpass
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from registry.adapter import PRODUCTION, AdapterName, Selector
from registry.base import Bases
from registry.errors import InvalidName, Refused, StoreUnavailable, WardrobeError
from registry.follow import wait_for_rollouts
from registry.home import default_cache, default_home
from registry.records import AliasMove
from registry.screen import (
    alias_table,
    history_table,
    plain,
    print_json,
    problem_lines,
    rollout_line,
    rollout_table,
    shown,
    summaries,
    summary_table,
    version_lines,
    version_table,
)
from registry.store import DATABASE_NAME, Registry

app = typer.Typer(no_args_is_help=True, add_completion=False)

Home = Annotated[
    Path | None, typer.Option("--home", help="The store. Default: $WARDROBE_HOME or your data.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Alias = Annotated[str, typer.Option("--alias", help="The pointer to move.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait up to 5 s for the servers that run now.")
]


@contextmanager
def clear_errors() -> Generator[None, None, None]:
    """Print an error that was raised on purpose in red and exit with 2. Also a decorator.

    A file or folder that the system refuses, such as one to write to, is said in the same way.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        said = shown(f"{error.filename} cannot be used: {error.strerror}.")
        Console(stderr=True, soft_wrap=True).print(f"[red]{said}[/]")
        raise typer.Exit(2) from error
    except WardrobeError as error:
        console = Console(stderr=True, soft_wrap=True)
        if isinstance(error, Refused) and len(error.problems) > 1:
            lines = [f"refused for {len(error.problems)} reasons:"]
            lines += [f"  {line}" for line in problem_lines(error.problems)]
        else:
            lines = [f"{error.message} {error.command}".rstrip()]
        console.print(f"[red]{shown(chr(10).join(lines))}[/]")
        raise typer.Exit(2) from error


@contextmanager
def open_registry(home: Path | None) -> Generator[Registry, None, None]:
    """Open the store that a command was asked to work on."""
    with Registry.open(home or default_home(), Bases(default_cache() / "bases")) as registry:
        yield registry


@app.command()
@clear_errors()
def push(
    folder: Annotated[
        Path, typer.Argument(help="As PEFT writes it; of a prompt, only wardrobe.json.")
    ],
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME")],
    base: Annotated[str | None, typer.Option("--base", help="Logical id of the base.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Check an adapter or a prompt and store it as the next version of NAME."""
    console = Console(stderr=True)
    with open_registry(home) as registry, console.status("Checking and storing …"):
        result = registry.push(folder, AdapterName.parse(name), base=base, actor=actor())
    if as_json:
        return print_json(result)
    for line in problem_lines(result.warnings):
        console.print(f"[yellow]warning: {shown(line)}[/]", soft_wrap=True)
    version = result.version
    said = "pushed" if result.created else "is there already:"
    _say(f"{said} [bold]{version.ref.label}[/] sha256:{version.digest[:12]} for {version.base_id}")
    return None


@app.command("list")
@clear_errors()
def list_adapters(home: Home = None, as_json: Json = False) -> None:
    """List the adapters, their newest version and their aliases."""
    with open_registry(home) as registry:
        found = summaries(registry)
    if as_json:
        return print_json(found)
    if not found:
        where = shown(str(home or default_home()))
        return _say(
            f"There is no adapter in {where} yet. "
            "Store one with: wardrobe push FOLDER NAMESPACE/NAME"
        )
    Console().print(summary_table(found))
    return None


@app.command()
@clear_errors()
def show(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME, or with @vN, @ALIAS, @sha256:…")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show an adapter, or one version of it, and what the running servers serve."""
    selector = Selector.parse(name)
    with open_registry(home) as registry:
        one = "@" in name
        versions = [registry.resolve(selector)] if one else registry.versions(selector.name)
        aliases = registry.aliases(selector.name)
        rollouts = registry.rollouts(selector.name)
    if as_json:
        answer = {"versions": versions, "aliases": aliases, "rollouts": rollouts}
        return print_json({"name": str(selector.name), **answer})
    console = Console()
    if one:
        for line in version_lines(versions[0]):
            console.print(line, soft_wrap=True)
    else:
        console.print(version_table(versions))
    if aliases:
        console.print(alias_table(aliases))
    else:
        _say(f"No alias points to a version yet: wardrobe promote {selector.name}@vN --reason TEXT")
    if rollouts:
        console.print(rollout_table(rollouts))
    return None


@app.command()
@clear_errors()
def promote(
    version: Annotated[str, typer.Argument(help="NAMESPACE/NAME@vN")],
    reason: Reason,
    alias: Alias = PRODUCTION,
    force: Annotated[bool, typer.Option("--force", help="Although its gate failed.")] = False,
    wait: Wait = True,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point an alias to a version; running servers follow within a second."""
    selector = Selector.parse(version)
    if selector.number is None:
        _not_a_number(version)
    with open_registry(home) as registry:
        move = registry.promote(
            selector.name,
            selector.number,
            alias=alias,
            reason=reason,
            actor=actor(),
            force=force,
        )
        _tell_move(registry, move, wait, as_json)


@app.command()
@clear_errors()
def rollback(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME")],
    reason: Reason,
    alias: Alias = PRODUCTION,
    wait: Wait = True,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point an alias back to where it was before its last promote."""
    with open_registry(home) as registry:
        move = registry.rollback(AdapterName.parse(name), alias=alias, reason=reason, actor=actor())
        _tell_move(registry, move, wait, as_json)


@app.command()
@clear_errors()
def history(
    name: Annotated[str, typer.Argument(help="NAMESPACE/NAME")],
    alias: Annotated[str | None, typer.Option("--alias", help="Only this one.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show who moved which alias, when and why; oldest first."""
    with open_registry(home) as registry:
        events = registry.history(AdapterName.parse(name), alias)
    if as_json:
        return print_json(events)
    Console().print(history_table(events))
    return None


@app.command()
@clear_errors()
def pull(
    selector: Annotated[str, typer.Argument(help="NAMESPACE/NAME[@vN|@ALIAS|@sha256:…]")],
    destination: Annotated[Path, typer.Argument(help="A folder that is empty or not there yet.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a version to a folder that PEFT loads."""
    with open_registry(home) as registry:
        version = registry.pull(Selector.parse(selector), destination)
    if as_json:
        return print_json(version)
    _say(f"pulled [bold]{version.ref.label}[/] to {shown(str(destination))}")
    return None


@app.command()
@clear_errors()
def verify(home: Home = None, as_json: Json = False) -> None:
    """Read every stored byte and compare it with its digest; exit with 1 on a problem."""
    home = home or default_home()
    if not (home / DATABASE_NAME).is_file():  # opening would make a new store, and that is sound
        raise StoreUnavailable(f"There is no store in {home}. Give the folder of one with --home.")
    columns = (
        TextColumn("verifying"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with open_registry(home) as registry, bar:
        task = bar.add_task("verify", total=None)
        report = registry.verify(lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        print_json({"ok": report.ok, **plain(report)})
    else:
        for problem in report.problems:
            Console().print(f"[red]{shown(problem)}[/]", soft_wrap=True)
        orphans = f", {len(report.orphans)} blobs without a version" if report.orphans else ""
        said = "[green]sound[/]" if report.ok else f"[red]{len(report.problems)} problems[/]"
        counted = f"{report.versions} versions, {report.blobs} blobs, {report.bytes:,} bytes"
        _say(f"{said}: {counted}{orphans}")
    if not report.ok:
        raise typer.Exit(1)


def _tell_move(registry: Registry, move: AliasMove, wait: bool, as_json: bool) -> None:
    """Say where the alias is now and how the servers took it; exit with 1 when one refused."""
    alias = move.alias
    if not as_json:
        before = f", before v{move.previous}" if move.previous and move.moved else ""
        said = "is now" if move.moved else "was already"
        _say(f"{alias.name}@{alias.alias} {said} [bold]v{alias.number}[/]{before}")
    rollouts, silent = wait_for_rollouts(registry, alias) if wait else ([], [])
    if as_json:
        print_json({**plain(move), "rollouts": rollouts, "silent": silent})
    else:
        for rollout in rollouts:
            _say(rollout_line(rollout))
        for server in silent:
            _say(f"[yellow]{server.url} has not answered yet[/]; see: wardrobe show {alias.name}")
    if any(rollout.state == "failed" for rollout in rollouts):
        raise typer.Exit(1)


def _not_a_number(text: str) -> NoReturn:
    raise InvalidName(f"{text!r} names no version number. Write NAMESPACE/NAME@vN.")


def actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"  # a container may run as a user that has no name


def _say(line: str) -> None:
    Console().print(line, soft_wrap=True, highlight=False)
