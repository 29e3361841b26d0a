"""The command line: the composition root, the only module that may import all three packages."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
