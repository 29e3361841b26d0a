"""The commands of tenants: key create, list, rotate and revoke; share and unshare."""

import re
from datetime import timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, clear_errors, open_registry
from registry.database import now
from registry.errors import WardrobeError
from registry.records import KeyRecord
from registry.screen import plain, print_json
from serving.tenants.keys import INFER, READ, add_key, rotate_key, rotate_operator_key

app = typer.Typer(no_args_is_help=True)
key_app = typer.Typer(no_args_is_help=True, help="Keys that open the server.")

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_SPAN = re.compile(r"([1-9][0-9]{0,5})([smhd])")

Tenant = Annotated[str, typer.Argument(help="The namespace the key belongs to, or operator.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id that `wardrobe key list` shows.")]
Name = Annotated[str, typer.Argument(help="NAMESPACE/NAME")]


class SpanInvalid(WardrobeError):
    code = "span_invalid"


@key_app.command("create")
@clear_errors()
def key_create(
    tenant: Tenant,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help="infer, read, push, promote or admin; may be repeated."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="SPAN", help="Such as 90d, 12h or 30m.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key for a tenant and print it once. Without --scope it may infer and read."""
    lifetime = _span(expires) if expires else None
    with open_registry(home) as registry:
        key = add_key(registry, tenant, scopes or (INFER, READ), lifetime)
    _show_key(key, as_json)


@key_app.command("list")
@clear_errors()
def key_list(home: Home = None, as_json: Json = False) -> None:
    """List the keys: whose they are, what they open and until when. Never the keys themselves."""
    with open_registry(home) as registry:
        keys = registry.keys()
    if as_json:
        return print_json([_facts(key) for key in keys])
    table = Table("id", "tenant", "scopes", "made", "state")
    for key in keys:
        table.add_row(
            key.key_id, plain(key.tenant), " ".join(key.scopes), key.created_at[:16], _state(key)
        )
    return Console().print(table)


@key_app.command("rotate")
@clear_errors()
def key_rotate(
    key_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Default: the operator's full key.")
    ] = None,
    grace: Annotated[
        str, typer.Option(metavar="SPAN", help="How long the old one of ID still works.")
    ] = "1h",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key like the one before it and print it once.

    The operator's full key ends at once; a key that is named works on for the grace.
    """
    with open_registry(home) as registry:
        if key_id is None:
            key = rotate_operator_key(registry)
        else:
            key = rotate_key(registry, key_id, _span(grace))
    _show_key(key, as_json)


@key_app.command("revoke")
@clear_errors()
def key_revoke(key_id: KeyId, home: Home = None, as_json: Json = False) -> None:
    """End a key; running servers refuse it within a second."""
    with open_registry(home) as registry:
        key = registry.revoke_key(key_id)
    if as_json:
        return print_json(_facts(key))
    return print(f"revoked {key.key_id} of {key.tenant}")


@app.command("share")
@clear_errors()
def share(
    name: Name,
    tenant: Annotated[str, typer.Option("--with", help="The tenant that may use it.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let another tenant use an adapter; it may not change it."""
    with open_registry(home) as registry:
        made = registry.share(AdapterName.parse(name), tenant)
    if as_json:
        return print_json({"name": str(made.name), "tenant": tenant, "shared_at": made.shared_at})
    return print(f"{tenant} may use {made.name}")


@app.command("unshare")
@clear_errors()
def unshare(
    name: Name,
    tenant: Annotated[str, typer.Option("--with", help="The tenant that may use it no more.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take a share back; running servers follow within a second."""
    with open_registry(home) as registry:
        there = registry.unshare(AdapterName.parse(name), tenant)
    if as_json:
        return print_json({"name": name, "tenant": tenant, "was_shared": there})
    return print(
        f"{tenant} may use {name} no more" if there else f"it was not shared with {tenant}"
    )


def _span(text: str) -> timedelta:
    match = _SPAN.fullmatch(text)
    if not match:
        raise SpanInvalid(f"{text!r} is no span of time. Write a number and s, m, h or d: 90d.")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _show_key(key: str, as_json: bool) -> None:
    if as_json:
        return print_json({"id": key.split("_")[1], "key": key})
    return print(key)


def _facts(key: KeyRecord) -> dict[str, object]:
    """Return what may be shown of a key: everything but the hash."""
    return {
        "id": key.key_id,
        "tenant": key.tenant,
        "scopes": list(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "valid": key.valid_at(now()),
    }


def _state(key: KeyRecord) -> str:
    if key.revoked_at:
        return f"revoked {key.revoked_at[:16]}"
    if not key.valid_at(now()):
        return f"expired {str(key.expires_at)[:16]}"
    return f"until {key.expires_at[:16]}" if key.expires_at else "valid"
