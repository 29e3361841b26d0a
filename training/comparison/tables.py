"""The tables of a report: the same cells on the page, in Markdown and on the terminal."""

from dataclasses import dataclass

from training.comparison.result import Comparison, Row, RunScore
from training.comparison.significance import interval
from training.comparison.verdict import break_even, p_value, size
from training.evaluation.statistics import Interval

NONE = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """Titles and cells; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables_of(comparison: Comparison) -> list[Table]:
    """Return every table that has something to show, the most important first."""
    made = [quality_table(comparison), cost_table(comparison)]
    if any(row.forgetting for row in comparison.rows):
        made.append(forgetting_table(comparison))
    if comparison.searched:
        made.append(search_table(comparison))
    return made


def by_value(comparison: Comparison) -> list[Row]:
    return sorted(comparison.rows, key=lambda row: -row.value)


def quality_table(comparison: Comparison) -> Table:
    """How good each row is, how sure that is, and how it compares with the best."""
    details = sorted({key for row in comparison.rows for key in row.details})
    split = any(comparison.near) and not all(comparison.near)
    columns = [comparison.setup.metric, "against the best"]
    columns += ["clean items", "near-duplicates"] if split else []
    columns += [detail.replace("_", " ") for detail in details]
    rows: list[tuple[str, ...]] = []
    for row in by_value(comparison):
        cells = [row.name, *quality_cells(comparison, row)]
        cells += [str(part) for part in parts(comparison, row)] if split else []
        cells += [_share(row.details.get(detail)) for detail in details]
        rows.append(tuple(cells))
    note = (
        "Shares with 95 % intervals. Against the best: items won and lost, and the p-value after "
        "Holm's correction over all pairs of the table."
    )
    if split:
        note += (
            " Near-duplicates are held-out items that closely resemble a training example; the "
            "clean ones say more about new requests."
        )
    return Table("How good", ("", *columns), tuple(rows), note)


def quality_cells(comparison: Comparison, row: Row) -> tuple[str, str]:
    """Return the row's metric, and how it compares with the best."""
    return str(interval(row.runs, comparison.groups)), _against(comparison, row)


def parts(comparison: Comparison, row: Row) -> tuple[Interval, Interval]:
    """Return the row on the clean items, and on those with a near-duplicate in training."""

    def part(wanted: bool) -> Interval:
        kept = [place for place, near in enumerate(comparison.near) if near is wanted]
        runs = [
            RunScore(seed=run.seed, values=tuple(run.values[place] for place in kept))
            for run in row.runs
        ]
        return interval(runs, [comparison.groups[place] for place in kept])

    return part(False), part(True)


def cost_table(comparison: Comparison) -> Table:
    """What each row costs to make, to keep, and at each request."""
    prompts = [row for row in comparison.rows if row.strategy == "few-shot"]
    prompt = max(prompts, key=lambda row: row.value, default=None)
    gpu = any(row.cost.gpu_seconds is not None for row in comparison.rows)
    columns = ["prompt tokens a request", "parameters trained", "on disk", "training CPU s"]
    columns += ["training GPU s"] if gpu else []
    columns += ["with its search", "peak memory"] + (["pays after"] if prompt else []) + ["chosen"]
    rows: list[tuple[str, ...]] = []
    for row in by_value(comparison):
        cost = row.cost
        cells = [row.name, f"{cost.prompt_tokens:.0f}", _count(cost.trainable), _size(cost.bytes)]
        cells += [_seconds(cost.cpu_seconds)] + ([_seconds(cost.gpu_seconds)] if gpu else [])
        cells += [_seconds(cost.search_cpu_seconds), _size(cost.peak_bytes or 0)]
        if prompt:
            cells.append(_break_even(row, prompt, comparison.setup.parameters))
        rows.append((*cells, row.settings))
    note = (
        "Training is one run of one seed in a process of its own, CPU seconds over all threads; "
        "its search is every learning rate that was tried for it."
    )
    if prompt:
        note += (
            f" Pays after: training FLOPs / (prompt tokens saved a request against {prompt.name} × "
            "2 × parameters of the base), in requests."
        )
    return Table("What it costs", ("", *columns), tuple(rows), note)


def forgetting_table(comparison: Comparison) -> Table:
    """What the base could do before, with each row on."""
    measured = [("the base itself", comparison.untouched)]
    measured += [(row.name, row.forgetting) for row in by_value(comparison)]
    rows = tuple(
        (
            name,
            str(Interval(kept.qa_accuracy, kept.qa_low, kept.qa_high)),
            _share(kept.format_leak),
            f"{kept.perplexity:.1f}",
            f"{kept.kl:.3f}",
        )
        for name, kept in measured
        if kept
    )
    columns = ("", "general questions right", "format leaks", "perplexity", "KL to the base")
    note = (
        "With the row on, asked about other things: general questions answered right (95 % "
        "interval), general answers that come in the format of the task, perplexity of general "
        "text, and nats a token to the base's own answers. Without it the base answers as ever. "
        "Adapters are asked without the task's prompt, prompts with it: they are nothing else."
    )
    return Table("What is forgotten", columns, rows, note)


def search_table(comparison: Comparison) -> Table:
    """Every learning rate tried, by the validation side."""
    rows = tuple(
        (
            tried.row,
            f"{tried.learning_rate:.2g}",
            f"{100 * tried.value:.1f} %",
            "chosen" if tried.chosen else "",
        )
        for tried in comparison.searched
    )
    note = "Chosen on validation examples; the held-out ones were asked for the chosen runs only."
    return Table("Learning rates tried", ("", "learning rate", "validation", ""), rows, note)


def markdown(table: Table) -> str:
    """Return a table as Markdown, its note below."""
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    text = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return f"{text}\n\n{table.note}" if table.note else text


def _against(comparison: Comparison, row: Row) -> str:
    best = comparison.verdict.best
    if row.name == best:
        return "best"
    pair = next(p for p in comparison.pairs if {p.first, p.second} == {best, row.name})
    won, lost = (pair.losses, pair.wins) if pair.first == best else (pair.wins, pair.losses)
    told = "worse" if row.name not in comparison.verdict.level else "not told apart"
    return f"{told}: +{won} −{lost}, {p_value(pair)}"


def _break_even(row: Row, prompt: Row, parameters: int) -> str:
    if row.cost.train_flops == 0:
        return NONE
    requests = break_even(row, prompt, parameters)
    return f"{requests:,.0f} requests" if requests is not None else "never"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.0f}" if value else NONE


def _count(value: int) -> str:
    return f"{value:,}" if value else NONE


def _size(value: int) -> str:
    return size(value) if value else NONE
