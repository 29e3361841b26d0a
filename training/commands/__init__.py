"""The commands of training."""

import typer

from training.commands import bases, compare, data, train, versions

app = typer.Typer(no_args_is_help=True, add_completion=False)
for part in (train, versions, compare):
    app.add_typer(part.app)
app.add_typer(data.app, name="data")
app.add_typer(bases.app, name="base")
