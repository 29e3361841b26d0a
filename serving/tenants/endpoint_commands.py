"""The commands of endpoints: create, list, show, set, delete."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, actor, clear_errors, open_registry
from registry.endpoints import merge, parse_target
from registry.errors import WardrobeError
from registry.records import Endpoint
from registry.screen import print_json, shown
from serving.api.defaults import check_defaults
from serving.routing import SYSTEM_PROMPT

app = typer.Typer(
    no_args_is_help=True, help="Stable names in front of adapters: what tenants call."
)

Name = Annotated[str, typer.Argument(help="NAMESPACE/NAME; the namespace is the tenant.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="NAME, NAME@ALIAS, NAME@vN, NAME@sha256:… or base."),
]
System = Annotated[
    str | None, typer.Option("--system", help="The system prompt where nobody brings one.")
]
Schema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A JSON schema that answers of a chat must fit."),
]
Defaults = Annotated[
    list[str] | None,
    typer.Option("--default", metavar="FIELD=JSON", help="Such as temperature=0.2; repeatable."),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")]


class DefaultInvalid(WardrobeError):
    code = "default_invalid"


@app.command("create")
@clear_errors()
def create(
    name: Name,
    model: Annotated[str, typer.Option("--model", help="NAME, NAME@ALIAS, NAME@vN, … or base.")],
    system: System = None,
    schema: Schema = None,
    defaults: Defaults = None,
    reason: Reason = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a stable name for a model, with what it fills in where a request leaves it out."""
    parsed = AdapterName.parse(name)
    filled = _checked(_given(system, schema, defaults or []))
    target = parse_target(model, parsed.namespace)
    with open_registry(home) as registry:
        made = registry.create_endpoint(parsed, target, filled, actor=actor(), reason=reason)
    _tell(made, as_json)


@app.command("list")
@clear_errors()
def list_endpoints(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List the endpoints, what they point at and what they fill in."""
    with open_registry(home) as registry:
        found = registry.endpoints(tenant)
    if as_json:
        return print_json([endpoint.facts() for endpoint in found])
    table = Table("endpoint", "model", "defaults", "changed")
    for each in found:
        fields = ", ".join(each.defaults) or "–"
        table.add_row(str(each.name), each.model, fields, each.changed_at[:16].replace("T", " "))
    return Console().print(table)


@app.command("show")
@clear_errors()
def show(name: Name, home: Home = None, as_json: Json = False) -> None:
    """Show an endpoint and every change of it."""
    with open_registry(home) as registry:
        endpoint = registry.endpoint(AdapterName.parse(name))
        history = registry.endpoint_history(endpoint.name)
    if as_json:
        return print_json({**endpoint.facts(), "history": history})
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]{endpoint.name}[/] is {endpoint.model}")
    for field, value in endpoint.defaults.items():
        console.print(f"{field}: {shown(json.dumps(value, ensure_ascii=False))}")
    for event in history:
        line = f"{event.at[:19]}  {event.action} by {event.actor}: {event.model}  {event.reason}"
        console.print(f"[dim]{shown(line)}[/]")
    return None


@app.command("set")
@clear_errors()
def change(
    name: Name,
    model: Model = None,
    system: System = None,
    schema: Schema = None,
    defaults: Defaults = None,
    unset: Annotated[
        list[str] | None, typer.Option("--unset", metavar="FIELD", help="Fill it in no more.")
    ] = None,
    reason: Reason = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Point an endpoint elsewhere or change what it fills in; running servers follow at once."""
    parsed = AdapterName.parse(name)
    given = _given(system, schema, defaults or [])
    if model is None and not given and not unset:
        raise DefaultInvalid("Nothing is changed: name --model, --default, --unset or another one.")
    with open_registry(home) as registry:
        known = registry.endpoint(parsed)
        if strange := [field for field in unset or [] if field not in known.defaults]:
            raise DefaultInvalid(f"{parsed} has no default {', '.join(strange)} to take away.")
        target = known.target if model is None else parse_target(model, parsed.namespace)
        changed = registry.change_endpoint(
            parsed,
            target,
            _checked(merge(known.defaults, given | dict.fromkeys(unset or []))),
            actor=actor(),
            reason=reason,
            expected_generation=known.generation,
        )
    _tell(changed, as_json)


@app.command("delete")
@clear_errors()
def delete(name: Name, reason: Reason = "", home: Home = None, as_json: Json = False) -> None:
    """End an endpoint; running servers know it no more within a second. Its history stays."""
    with open_registry(home) as registry:
        gone = registry.delete_endpoint(AdapterName.parse(name), actor=actor(), reason=reason)
    if as_json:
        return print_json({"id": str(gone.name), "deleted": True})
    return print(f"{gone.name} is no more; it was {gone.model}")


def _given(system: str | None, schema: Path | None, defaults: list[str]) -> dict[str, Any]:
    """Return the defaults that the options name. Raises DefaultInvalid."""
    given: dict[str, Any] = {}
    for text in defaults:
        field, equals, value = text.partition("=")
        if not equals:
            raise DefaultInvalid(f"{text!r} is no default: write FIELD=JSON, such as top_p=0.9.")
        given[field] = _json(value, f"--default {field}")
    if system is not None:
        given[SYSTEM_PROMPT] = system
    if schema is not None:
        wanted = {"name": "answer", "schema": _read_schema(schema)}
        given["response_format"] = {"type": "json_schema", "json_schema": wanted}
    return given


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise DefaultInvalid(f"--schema: {path} cannot be read: {error}.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DefaultInvalid(f"--schema: {path} is no JSON: {error}.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DefaultInvalid(
            f"{where}: {text[:100]!r} is no JSON: {error}. A text needs quotes: stop='\"END\"'."
        ) from error


def _checked(defaults: dict[str, Any]) -> dict[str, Any]:
    check_defaults(defaults)
    return defaults


def _tell(endpoint: Endpoint, as_json: bool) -> None:
    if as_json:
        return print_json(endpoint.facts())
    fields = f", fills in {', '.join(endpoint.defaults)}" if endpoint.defaults else ""
    return print(f"{endpoint.name} is {endpoint.model}{fields}")
