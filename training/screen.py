"""Progress of long work on a terminal: one rich bar for each piece, on standard error."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from training.batches import MaskedSample
from training.evaluation.evaluate import CLEAN_PART, NEAR_PART
from training.evaluation.gate import ITEMS_FILE
from training.evaluation.standings import Standings
from training.evaluation.statistics import LEVEL, Interval
from training.progress import Progress, Report
from training.recipe import Recipe
from training.train import TrainedAdapter

PARTS = {NEAR_PART: "near-duplicates", CLEAN_PART: "clean"}  # of training prompts


class _Loss(ProgressColumn):
    """The loss where there is one, and what is left as the work itself estimates it."""

    def render(self, task: Task) -> Text:
        eta, loss = task.fields.get("eta"), task.fields.get("loss")
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        parts += [] if eta is None or task.finished else [f"{eta:.0f} s left"]
        return Text(" ".join(parts), style="cyan", no_wrap=True)


def sample_panel(sample: MaskedSample) -> Panel:
    """Show one training row: grey is what the loss ignores, green what it learns."""
    text = Text(sample.ignored, style="dim") + Text(sample.learned, style="green")
    return Panel(text, title="one training row: only the green part is learned", expand=False)


def score_table(recipe: Recipe, trained: TrainedAdapter) -> Table:
    """Return what the card says of the held-out examples: the metric with its 95 % interval."""
    metrics, gate = trained.card["metrics"], trained.card["gate"]
    table = Table(title=f"{recipe.name}: {metrics['metric']} on held-out groups")
    for column in ("", "right", "value (95 % interval)", "loss"):
        table.add_column(column)
    for row in ("base", "adapter"):
        facts = metrics[row]
        table.add_row(
            _row_name(row, trained.card), *_score_cells(facts), f"{facts['loss']['value']:.3f}"
        )
        for part, of_part in facts["parts"].items():
            table.add_row(f"  {PARTS[part]}", *_score_cells(of_part), style="dim")
    if failed := metrics["adapter"].get("errors"):
        table.add_row("", "", f"[red]task.function failed on {failed} answers, see {ITEMS_FILE}[/]")
    verdict = "[green]passed[/]" if gate["passed"] else f"[red]{'; '.join(gate['failures'])}[/]"
    table.add_row("gate", "", verdict)
    return table


def forgetting_table(card: dict[str, Any]) -> Table:
    """Return what the card says of general text and questions, beside the base."""
    table = Table(title="general ability")
    for column in ("", "perplexity", "right answers", "task's format", "KL to base", "off = base"):
        table.add_column(column)
    same = {None: "", True: "[green]bit for bit[/]", False: "[red]no[/]"}
    for name, facts in card["metrics"]["forgetting"].items():
        table.add_row(
            _row_name(name, card),
            f"{facts['perplexity']:.1f}",
            _share(facts["answered"]),
            _share(facts["leaked"]),
            f"{facts['kl']['value']:.3f}",
            same[facts["off_is_base"]],
        )
    return table


def standings_table(recipe: Recipe, standings: Standings) -> Table:
    """Return each version's metric with its interval, near-duplicates apart."""
    table = Table(title=f"{recipe.name}: {standings.metric} on held-out groups")
    parts = sorted({part for one in standings.evaluations for part in one.parts})
    table.add_column("", overflow="fold")
    for column in ("right", "value (95 % interval)", *(PARTS[part] for part in parts)):
        table.add_column(column)
    for one in standings.evaluations:
        cells = [str(one.parts[part].share) for part in parts]
        right = f"{one.score.correct}/{one.score.total}"
        table.add_row(one.name, right, str(one.score.share), *cells)
    return table


def pair_table(standings: Standings) -> Table:
    """Return every pair: the difference, and whether it can be told from chance."""
    table = Table(title=f"pairs on the same items, Holm over {len(standings.pairs)}")
    table.add_column("", overflow="fold")
    for column in ("points (95 %)", "wins/losses", "p", "told apart"):
        table.add_column(column)
    for pair in standings.pairs:
        found = pair.difference
        points = f"{100 * found.value:+.1f} ({100 * found.low:+.1f}–{100 * found.high:+.1f})"
        table.add_row(
            f"{pair.second} over {pair.first}",
            points,
            f"{found.wins}/{found.losses}",
            f"{pair.p_holm:.2g}",
            "[green]yes[/]" if pair.p_holm < LEVEL else "no",
        )
    return table


def _row_name(row: str, card: dict[str, Any]) -> str:
    return "prompt" if row == "adapter" and card["kind"] == "prompt" else row


def _share(facts: dict[str, Any]) -> str:
    return str(Interval(facts["value"], facts["low"], facts["high"]))


def _score_cells(facts: dict[str, Any]) -> tuple[str, str]:
    return f"{facts['correct']}/{facts['total']}", _share(facts)


def extraction_table(card: dict[str, Any]) -> Table:
    """Return how much of the fine-tune's change each kind of linear layer kept."""
    facts = card["lineage"]["extracted"]
    table = Table(title="what is kept of the change, as a share of its energy")
    for column in ("", "kept", "highest rank"):
        table.add_column(column)
    for kind, kept in facts["modules"].items():
        table.add_row(kind, f"{100 * kept['kept']:.1f} %", str(kept["highest_rank"]))
    table.add_row("all linears", f"{100 * facts['kept']:.1f} %", "")
    left = facts["left_out"]
    text = f"left out: {left['tensors']} embeddings, norms and heads"
    table.add_row(text, f"{100 * left['share']:.1f} % of all", "")
    return table


@contextmanager
def progress_bars() -> Generator[Report, None, None]:
    """Yield a report function; each stage and text gets a bar of its own."""
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _Loss(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        yield _Reporter(bars).report


class _Reporter:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def report(self, progress: Progress) -> None:
        key = (progress.stage, progress.text)
        if key not in self._tasks:
            description = f"{progress.stage} {progress.text}".strip()
            self._tasks[key] = self._bars.add_task(description, total=None)
        self._bars.update(
            self._tasks[key],
            completed=progress.done,
            total=progress.total or None,
            loss=progress.loss,
            eta=progress.eta_seconds,
        )
