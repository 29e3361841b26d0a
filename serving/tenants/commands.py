"""The commands of tenants: tenant list, show; key create, list, rotate, revoke; share, unshare."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from registry.adapter import AdapterName
from registry.commands import Home, Json, clear_errors, open_registry
from registry.database import now
from registry.records import KeyRecord
from registry.screen import plain, print_json, shown
from serving.tenants.duration import parse_duration
from serving.tenants.keys import (
    INFER,
    READ,
    SCOPES,
    add_key,
    describe,
    id_of,
    rotate_key,
    rotate_operator_key,
)
from serving.tenants.tenants import get_tenant, list_tenants

app = typer.Typer(no_args_is_help=True)
key_app = typer.Typer(no_args_is_help=True, help="Keys that open the server.")
tenant_app = typer.Typer(no_args_is_help=True, help="Tenants and what they have.")

Tenant = Annotated[str, typer.Argument(help="The namespace the key belongs to, or operator.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The id that `wardrobe key list` shows.")]
Name = Annotated[str, typer.Argument(help="NAMESPACE/NAME")]


@tenant_app.command("list")
@clear_errors()
def tenant_list(home: Home = None, as_json: Json = False) -> None:
    """List whoever has a key, an adapter, a share or an endpoint."""
    with open_registry(home) as registry:
        found = list_tenants(registry)
    if as_json:
        return print_json(found)
    table = Table("tenant", "valid keys", "adapters", "shared with it", "endpoints")
    for each in found:
        counts = (each.valid_keys, len(each.adapters), len(each.shared), len(each.endpoints))
        table.add_row(shown(each.name), *map(str, counts))
    return Console().print(table)


@tenant_app.command("show")
@clear_errors()
def tenant_show(
    tenant: Annotated[str, typer.Argument(help="The namespace of its adapters.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what a tenant has, by name."""
    with open_registry(home) as registry:
        found = get_tenant(registry, tenant)
    if as_json:
        return print_json(found)
    print(f"{found.name}: {found.valid_keys} valid keys")
    for word in ("adapters", "shared", "endpoints"):
        print(f"{word}: {', '.join(getattr(found, word)) or '–'}")
    return None


@key_app.command("create")
@clear_errors()
def key_create(
    tenant: Tenant,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", help=f"{', '.join(SCOPES)}; may be repeated."),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="SPAN", help="Such as 90d, 12h or 30m.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key for a tenant and print it once. Without --scope it may infer and read."""
    lifetime = None if expires is None else parse_duration(expires)
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
        return print_json([describe(key) for key in keys])
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
            key = rotate_key(registry, key_id, parse_duration(grace))
    _show_key(key, as_json)


@key_app.command("revoke")
@clear_errors()
def key_revoke(key_id: KeyId, home: Home = None, as_json: Json = False) -> None:
    """End a key; running servers refuse it within a second."""
    with open_registry(home) as registry:
        key = registry.revoke_key(key_id)
    if as_json:
        return print_json(describe(key))
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


def _show_key(key: str, as_json: bool) -> None:
    if as_json:
        return print_json({"id": id_of(key), "key": key})
    return print(key)


def _state(key: KeyRecord) -> str:
    if key.revoked_at:
        return f"revoked {key.revoked_at[:16]}"
    if not key.valid_at(now()):
        return f"expired {str(key.expires_at)[:16]}"
    return f"until {key.expires_at[:16]}" if key.expires_at else "valid"
