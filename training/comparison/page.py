"""The report: one HTML page that needs nothing else, the same as Markdown, the facts as JSON."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from training.comparison.plots import COLOURS, draw_plots
from training.comparison.result import Comparison, Row, write_comparison
from training.comparison.significance import interval
from training.comparison.tables import by_value, markdown, tables_of
from training.run import replace_file

HERE = Path(__file__).parent
PAGE, TEXT = "report.html", "report.md"
CAPTIONS = {
    "forgetting": (
        "Learning against forgetting",
        "Up is better at the task, right keeps more; the dotted line is the base itself.",
    ),
    "cost": (
        "Quality against cost",
        "Up is better, left is cheaper: training and 10,000 prompts together.",
    ),
    "examples": ("Metric against examples", "What more training examples bring."),
    "rank": ("Metric against rank", "What rank keeps the metric."),
    "loss": ("Training loss", "First seed of each row."),
}


def write_report(folder: Path, comparison: Comparison) -> Path:
    """Write report.json, report.md and report.html; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_comparison(folder, comparison)
    replace_file(folder / TEXT, as_markdown(comparison).encode())
    replace_file(folder / PAGE, as_page(comparison).encode())
    return folder / PAGE


def as_page(comparison: Comparison) -> str:
    """Render the page. Names and settings are escaped; only our own SVG is markup."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = {name: Markup(svg) for name, svg in draw_plots(comparison).items()}  # noqa: S704  # made by matplotlib, which escapes the names in it
    return environment.get_template("report.html.jinja").render(
        comparison=comparison,
        setup=comparison.setup,
        verdict=comparison.verdict,
        tables=tables_of(comparison),
        forest={row.name: _forest(row, comparison) for row in by_value(comparison)},
        plots=plots,
        captions=CAPTIONS,
        facts=setup_facts(comparison),
    )


def as_markdown(comparison: Comparison) -> str:
    """Render the same without pictures."""
    setup, verdict = comparison.setup, comparison.verdict
    parts = [f"# {setup.recipe}: which way to specialise {setup.base}", f"**{verdict.headline}**"]
    parts.append("\n".join(f"- {finding}" for finding in verdict.findings))
    if verdict.ship and (command := comparison.row(verdict.ship).ship):
        parts.append(f"```\n{command}\n```")
    for table in tables_of(comparison):
        parts += [f"## {table.title}", markdown(table)]
    if comparison.left_out:
        lines = [f"- {left.cell}: {left.reason}" for left in comparison.left_out]
        parts += ["## Left out", "\n".join(lines)]
    parts += ["## How it was measured"]
    parts.append("\n".join(f"- {name}: {value}" for name, value in setup_facts(comparison)))
    return "\n\n".join(parts) + "\n"


def setup_facts(comparison: Comparison) -> list[tuple[str, str]]:
    """Return what a reader needs to repeat it."""
    setup = comparison.setup
    return [
        ("recipe", setup.recipe),
        ("base", f"{setup.base}, {setup.parameters:,} parameters"),
        (
            "examples",
            f"{setup.train_examples} to train on, {setup.validation_examples} to choose by, "
            f"{setup.held_out_examples} held out by group",
        ),
        ("training", f"{setup.steps} steps of {setup.batch_size}, {_seeds(setup.seeds)}"),
        ("answers", "greedy; the same prompt, parser and items for every row"),
        ("intervals", "95 %: Wilson for one run, over items and runs for several"),
        (
            "tests",
            "paired on the same items: McNemar's exact test for one run each, Student's t over "
            "items and runs for several; Holm over all pairs",
        ),
        ("machine", setup.machine),
        ("versions", ", ".join(f"{name} {number}" for name, number in setup.versions.items())),
        ("data sha256", setup.data_sha256),
        ("measured", f"{setup.date}; the call that finished it took {setup.minutes:.1f} minutes"),
    ]


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _forest(row: Row, comparison: Comparison) -> dict[str, str]:
    """Return where a row's interval lies on a line from 0 to 100, and its colour."""
    share = interval(row.runs, comparison.groups)
    return {
        "low": f"{100 * share.low:.2f}",
        "high": f"{100 * share.high:.2f}",
        "value": f"{100 * share.value:.2f}",
        "colour": COLOURS[row.strategy],
    }
