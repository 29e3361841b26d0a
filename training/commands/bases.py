"""wardrobe base: the base models on this machine."""

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from registry.architectures import read_base_config, unsupported_architecture
from registry.base import BaseModel, Bases
from registry.commands import Json, clear_errors
from registry.errors import BaseNotFound, InvalidName
from registry.home import default_cache
from registry.screen import print_json
from registry.text_half import TEXT_HALF

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

app = typer.Typer(no_args_is_help=True, help="Base models on this machine.")
out = Console(soft_wrap=True)


def known_bases() -> Bases:
    return Bases(default_cache() / "bases")


def find_base(spec: str) -> BaseModel:
    """Return a base by its id; pull it when it is not on this machine yet, or named by a path."""
    try:
        return known_bases().get(spec)
    except (BaseNotFound, InvalidName):
        return pull(spec)


def pull(spec: str, base_id: str | None = None) -> BaseModel:
    from training.base import pull_base
    from training.screen import progress_bars

    with progress_bars() as report:
        return pull_base(spec, known_bases(), progress=report, base_id=base_id)


@app.command("pull")
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
    if base.origin.endswith(TEXT_HALF):
        out.print("It also sees: its text half was kept, and no image is served.")
    if problem := unsupported_architecture(read_base_config(base.path)):
        out.print(f"The torch engine cannot serve it: {escape(problem)}")
    return None


@app.command("list")
@clear_errors()
def base_list(as_json: Json = False) -> None:
    """List the base models on this machine."""
    bases = known_bases().list()
    if as_json:
        return print_json(bases)
    table = Table("fingerprint", "model_type")
    table.add_column("id", overflow="fold")
    table.add_column("path", overflow="fold")
    for base in bases:
        kind = read_base_config(base.path).get("model_type", "")
        table.add_row(base.fingerprint[:12], escape(kind), base.id, escape(str(base.path)))
    out.print(table, soft_wrap=False)
    return None
