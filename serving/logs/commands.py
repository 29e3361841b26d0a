"""The commands of the request log: set, settings, show, export, prune."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from registry.commands import Home, Json, clear_errors
from registry.errors import WardrobeError
from registry.home import default_home
from registry.screen import print_json, shown
from serving.logs.entry import LogSettings
from serving.logs.redact import PatternInvalid
from serving.logs.store import Logged, Logs, LogSettingInvalid, Wanted, ago, older_than
from serving.tenants.duration import parse_duration

app = typer.Typer(no_args_is_help=True, help="What every request was; what was said, by consent.")

Tenant = Annotated[str | None, typer.Option("--tenant", help="Only requests of this tenant.")]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Only of NAMESPACE/NAME.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="SPAN", help="Only younger ones: 2d, 12h, 30m.")
]
Failed = Annotated[bool, typer.Option("--failed", help="Only what did not end normally.")]
Said = Annotated[
    bool, typer.Option("--contents", help="Only with prompt and answer, and show them.")
]


class ExportRefused(WardrobeError):
    code = "export_refused"


class PruneRefused(WardrobeError):
    code = "prune_refused"


@contextmanager
def open_logs(home: Path | None) -> Generator[Logs]:
    with Logs(home or default_home()) as logs:
        yield logs


@app.command("set")
@clear_errors()
def set_logs(
    tenant: Annotated[str, typer.Argument(help="Whose requests.")],
    contents: Annotated[
        bool | None,
        typer.Option("--contents/--no-contents", help="Keep prompts and answers, or none at all."),
    ] = None,
    sample: Annotated[
        float | None, typer.Option(help="Share of the requests whose contents are kept.")
    ] = None,
    redact: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=REGEX", help="Takes out what fits; may be repeated."),
    ] = None,
    keep: Annotated[int | None, typer.Option(metavar="DAYS", help="Deleted afterwards.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Say how a tenant's requests are logged; what is not named stays. Live within seconds.

    --no-contents deletes at once what was kept of prompts and answers.
    """
    if contents is False and sample:
        raise LogSettingInvalid(f"--no-contents keeps none, and --sample {sample:g} some. Say one.")
    with open_logs(home) as logs:
        known = logs.settings().get(tenant, LogSettings(tenant))
        if contents is not None:
            known = replace(known, sample=(known.sample or 1.0) if contents else 0.0)
        if sample is not None:
            known = replace(known, sample=sample)
        if redact is not None:
            known = replace(known, patterns=dict(map(_pattern, redact)))
        if keep is not None:
            known = replace(known, keep_days=keep)
        known = logs.set(known)
    if as_json:
        return print_json(asdict(known))
    return print(_sentence(known))


@app.command("settings")
@clear_errors()
def show_settings(home: Home = None, as_json: Json = False) -> None:
    """List the tenants that have settings of their own."""
    with open_logs(home) as logs:
        known = logs.settings()
    if as_json:
        return print_json([asdict(wanted) for wanted in known.values()])
    for wanted in known.values():
        print(_sentence(wanted))
    return print(f"all others: {_sentence(LogSettings('')).removeprefix(': ')}")


@app.command("show")
@clear_errors()
def show(
    request_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="One request, with all that is known.")
    ] = None,
    tenant: Tenant = None,
    adapter: Adapter = None,
    since: Since = None,
    failed: Failed = False,
    contents: Said = False,
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many, the latest ones.")] = 20,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show the latest requests, the latest at the end."""
    with open_logs(home) as logs:
        if request_id is not None:
            return print_json(_facts(logs.get(request_id, tenant), contents=True))
        found = logs.find(_wanted(tenant, adapter, since, failed, contents), limit=last)[::-1]
    if as_json:
        return print_json([_facts(logged, contents=contents) for logged in found])
    Console().print(_table(found))
    if contents:
        for logged in found:
            _print_said(logged)
    return None


@app.command("export")
@clear_errors()
def export(
    out: Annotated[Path, typer.Argument(help="The JSON lines file to write; not there yet.")],
    tenant: Tenant = None,
    adapter: Adapter = None,
    since: Since = None,
    failed: Failed = False,
    contents: Said = False,
    home: Home = None,
) -> None:
    """Write requests to a file, one JSON object a line, the oldest first."""
    if out.exists():
        raise ExportRefused(f"{out} is there already. Name a file that is not.")
    wanted, part = _wanted(tenant, adapter, since, failed, contents), Path(f"{out}.part")
    with open_logs(home) as logs, part.open("w", encoding="utf-8") as file:
        total = logs.count(wanted)
        bar = track(
            logs.walk(wanted),
            "exporting",
            total=total,
            console=Console(stderr=True),
            transient=True,
        )
        for logged in bar:
            facts = _facts(logged, contents=contents)
            file.write(json.dumps(facts, ensure_ascii=False) + "\n")
    part.replace(out)
    print(f"{total} requests are in {out}")


@app.command("prune")
@clear_errors()
def prune(
    older: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Younger ones, too: all older than this.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="With --older: only of this tenant.")
    ] = None,
    contents: Annotated[
        bool, typer.Option("--contents", help="With --older: only prompts and answers.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Delete what is older than its tenant wants, now. A running server does so by itself."""
    if older is None and (tenant is not None or contents):
        raise PruneRefused("--tenant and --contents go with --older. Give it, too: --older 30d.")
    with open_logs(home) as logs:
        if older is None:
            deleted = logs.prune()
        else:
            deleted = logs.forget(older_than(parse_duration(older), tenant), said_only=contents)
    if as_json:
        return print_json({"deleted": deleted})
    return print(f"deleted {'the contents of ' if contents else ''}{deleted} requests")


def _wanted(
    tenant: str | None, adapter: str | None, since: str | None, failed: bool, contents: bool
) -> Wanted:
    after = None if since is None else ago(parse_duration(since))
    return Wanted(tenant, adapter, since=after, failed=failed, with_contents=contents)


def _pattern(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    if not equals:
        raise PatternInvalid(f"{text!r} is no NAME=REGEX, such as order=ORD-[0-9]+.")
    return name, pattern


def _sentence(wanted: LogSettings) -> str:
    said = "prompts and answers are not kept"
    if wanted.sample > 0:
        names = ", ".join(["the built-in patterns", *wanted.patterns])
        share = f"{100 * wanted.sample:g} %"
        said = f"prompts and answers of {share} are kept; what fits {names} is taken out"
    return f"{wanted.tenant}: {said}; everything is deleted after {wanted.keep_days} days"


def _facts(logged: Logged, *, contents: bool) -> dict[str, Any]:
    said = {"contents": logged.contents and asdict(logged.contents)} if contents else {}
    return {"seq": logged.seq, **asdict(logged.entry), **said}


def _table(found: list[Logged]) -> Table:
    table = Table("when", "id", "tenant", "ran", "status", "ended", "tokens", "ms")
    for logged in found:
        e = logged.entry
        ran = e.version or f"{e.method} {e.route}"
        tokens = f"{e.prompt_tokens} + {e.completion_tokens}"
        ended = e.outcome or e.finish or "ok"
        row = (e.at[:19], e.request_id, e.tenant or "–", ran, str(e.status), ended, tokens)
        table.add_row(*map(shown, row), f"{e.ms:.0f}")
    return table


def _print_said(logged: Logged) -> None:
    assert logged.contents is not None, "only requests with contents were asked for"
    console = Console(soft_wrap=True)
    console.print(f"\n[bold]{logged.entry.request_id}[/]", highlight=False)
    for said in logged.contents.prompt:
        console.print(f"[dim]{said['role']}:[/] {shown(said['content'])}", highlight=False)
    for answer in logged.contents.answers:
        console.print(f"[dim]answer:[/] {shown(answer)}", highlight=False)
