"""The commands of limits and usage: limit set, show, clear and history; usage."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.home import default_home
from registry.screen import print_json, shown
from serving.tenants.balances import Balances
from serving.tenants.ledger import Ledger
from serving.tenants.limit import EVERYBODY, WORDS, Limit, LimitInvalid, Subject
from serving.tenants.standing import Clock, Period, Standing
from serving.tenants.tally import Tally
from serving.tenants.tenants import require_tenant
from serving.tenants.usage import Span, csv_of

app = typer.Typer()
limit_app = typer.Typer(
    no_args_is_help=True, help="What tenants may use: per minute, at once, per day and month."
)

Tenant = Annotated[str, typer.Argument(help="A tenant, or '*' for each without its own limit.")]
Name = Annotated[
    str | None,
    typer.Argument(help="Only for this adapter or endpoint, or base. Default: all it asks for."),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")]


def open_ledger(home: Path | None) -> Ledger:
    return Ledger(home or default_home())


@limit_app.command("set")
@clear_errors()
def limit_set(
    tenant: Tenant,
    name: Name = None,
    requests: Annotated[int | None, typer.Option(help="Requests a minute.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens a minute, of prompts and answers together.")
    ] = None,
    concurrent: Annotated[int | None, typer.Option(help="Answers that run at once.")] = None,
    day: Annotated[int | None, typer.Option(help="Tokens a day (UTC).")] = None,
    month: Annotated[int | None, typer.Option(help="Tokens a month (UTC).")] = None,
    reason: Reason = "set",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Set limits; the others stay as they are. Running servers follow within a second."""
    subject = Subject.parse(tenant, name)
    asked = Limit(requests, tokens, concurrent, day, month)
    values = {field: value for field, value in asdict(asked).items() if value is not None}
    if not values:
        raise LimitInvalid("Nothing is set: name one or more limits, such as --tokens 20000.")
    if subject.tenant != EVERYBODY:
        with open_registry(home) as registry:
            require_tenant(registry, subject.tenant)
    with open_ledger(home) as ledger:
        limit = ledger.set_limit(subject, values, actor=actor(), reason=reason)
    if as_json:
        return print_json({"tenant": subject.tenant, "name": subject.name, **asdict(limit)})
    return _print_limits({subject: limit})


@limit_app.command("show")
@clear_errors()
def limit_show(
    tenant: Annotated[
        str | None, typer.Argument(help="With what is left. Default: the limits of all.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show the limits that are set; for one tenant those in force and what is left of them."""
    with open_ledger(home) as ledger:
        found = ledger.limits(tenant)
        looked = _look(ledger, [Subject.parse(tenant, None), *found]) if tenant else []
    if tenant is not None:
        if as_json:
            return print_json([standing.facts() for standing in looked])
        return _print_standings(looked)
    if as_json:
        rows = ({"tenant": s.tenant, "name": s.name, **asdict(lim)} for s, lim in found.items())
        return print_json(list(rows))
    return _print_limits(found)


def _look(ledger: Ledger, subjects: list[Subject]) -> list[Standing]:
    balances = Balances(ledger.path, "", Tally(), Clock())
    try:
        return [balances.look(subject) for subject in dict.fromkeys(subjects)]
    finally:
        balances.close()


@limit_app.command("clear")
@clear_errors()
def limit_clear(
    tenant: Tenant,
    name: Name = None,
    reason: Reason = "cleared",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take a tenant's limit away: the one of '*' is in force then, or under a name none."""
    subject = Subject.parse(tenant, name)
    with open_ledger(home) as ledger:
        there = ledger.clear_limit(subject, actor=actor(), reason=reason)
    if as_json:
        return print_json({"tenant": subject.tenant, "name": subject.name, "cleared": there})
    return print(f"{subject} has no limit of its own" + ("" if there else ", and had none"))


@limit_app.command("history")
@clear_errors()
def limit_history(
    tenant: Annotated[str | None, typer.Argument(help="Default: all.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show who set which limit, when and why; oldest first."""
    with open_ledger(home) as ledger:
        events = ledger.limit_history(tenant)
    if as_json:
        return print_json(events)
    table = Table("when", "of", "set to", "by", "why")
    for event in events:
        after = str(event.after) if event.after else "cleared"
        who, why = shown(event.actor), shown(event.reason)
        table.add_row(event.at[:19], str(event.subject), after, who, why)
    return Console().print(table)


@app.command("usage")
@clear_errors()
def usage(
    tenant: Annotated[str | None, typer.Option(help="Default: all tenants.")] = None,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="2026-11-25T13, 2026-11-25 or 2026-11, UTC."),
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="With that hour, day or month.")
    ] = None,
    by: Annotated[
        Literal["hour", "day", "version"],
        typer.Option(help="A row for each; with version one for the whole time."),
    ] = "day",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what was used, by tenant, name and version; by default in the last 30 days."""
    if as_csv and as_json:
        raise LimitInvalid("Take one of --csv and --json.")
    span = Span.parse(first, last, Period.now())
    with open_ledger(home) as ledger:
        rows = ledger.usage(span, by, tenant)
    if as_csv:
        sys.stdout.write(csv_of(rows))
        return None
    if as_json:
        return print_json([row.facts() for row in rows])
    times = [] if by == "version" else [by]
    table = Table(*times, "tenant", "name", "version", "answers", "prompt", "completion", "tokens")
    for row in rows:
        counts = (row.answers, row.prompt_tokens, row.completion_tokens, row.total_tokens)
        texts = [row.time, row.tenant, row.name, shown(row.version)]
        table.add_row(*(texts[1:] if by == "version" else texts), *map(str, counts))
    return Console().print(table)


def _print_limits(found: dict[Subject, Limit]) -> None:
    table = Table("tenant", "of", "limits")
    for subject, limit in found.items():
        table.add_row(subject.tenant, subject.name or "all", str(limit))
    Console().print(table)


def _print_standings(standings: list[Standing]) -> None:
    table = Table("of", "limit", "", "left")
    for standing in standings:
        requests, tokens, limit = standing.requests, standing.tokens, standing.limit
        left = (
            requests and requests.remaining,
            tokens and tokens.remaining,
            (limit.concurrent or 0) - standing.answers,
            (limit.tokens_per_day or 0) - standing.day - standing.held,
            (limit.tokens_per_month or 0) - standing.month - standing.held,
        )
        for most, words, rest in zip(asdict(limit).values(), WORDS, left, strict=True):
            if most is not None:
                table.add_row(standing.subject.name or "all", str(most), words, str(rest))
    Console().print(table)
