"""Every check over a recipe's data, with the counts that say what the data is."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from registry.card import MAX_CARD_BYTES, check_card
from registry.jsonfile import read_object
from training.data.checks import (
    Finding,
    check_examples_in_prompt,
    check_groups,
    check_labels,
    check_near_duplicates,
    check_near_leaks,
    check_reading,
    check_repetitions,
    check_rows,
)
from training.data.examples import Data, Example, ask
from training.data.load import divide
from training.data.rows import Row, measure, template_problems
from training.data.selection import Difficulty
from training.data.source import Source, read_source
from training.errors import BaseUnavailable, DataError
from training.progress import Progress, Report
from training.prompt import Prompter, load_prompter
from training.recipe import Recipe

BINS = 8


@dataclass(frozen=True, slots=True)
class Histogram:
    """Token counts in `BINS` or fewer bins of equal width."""

    edges: tuple[int, ...]  # the first count of each bin; the last bin ends at `most`
    counts: tuple[int, ...]
    median: int
    most: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the data is and what is wrong with it."""

    rows: dict[str, int]  # side → examples, after the split
    groups: dict[str, int]  # side → groups
    duplicates: int
    digest: str | None  # of the sides; None when they cannot be made
    findings: tuple[Finding, ...]
    prompt_tokens: Histogram | None  # None without the base's tokenizer
    completion_tokens: Histogram | None
    labels: dict[str, dict[str, int]]  # side → label → rows, where the metric is a label's

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)


def inspect_data(
    recipe: Recipe,
    base: Path,
    report: Report,
    difficulty: Difficulty | None = None,
    shots: Sequence[Example] = (),
) -> tuple[Inspection, Data | None]:
    """Read a recipe's data and look for everything that is wrong with it.

    `base` is the folder of the base model: its tokenizer and chat template decide. `shots` are
    the examples of a prompt. The data is None when there are no two sides of it. Raises DataError
    for a source that cannot be read.
    """
    source = read_source(recipe)
    findings = [*check_reading(source.bad), *check_repetitions(source)]
    if recipe.data.group is not None:
        findings += check_groups(source)
    data: Data | None = None
    try:
        data = divide(source, recipe, difficulty)
    except DataError as error:
        findings.append(Finding("split", "error", error.message))
    rows: list[Row] = []
    try:
        prompter = load_prompter(base, recipe.task.system)
        wrong = list(template_problems(prompter))
    except BaseUnavailable as error:
        findings.append(Finding("template", "error", error.message))
    else:
        findings += (Finding("template", "error", problem) for problem in wrong)
        if not wrong:  # else every row would be measured, and named, as something else
            rows = _measured(source, data, recipe, prompter, report)
            findings += check_rows(rows, recipe.train.max_length, recipe.train.too_long)
    if data is not None:
        findings += _side_findings(data, recipe, report)
        findings += check_examples_in_prompt(shots, data)
    return _inspection(recipe, data, rows, findings), data


def read_shots(card: Path) -> list[Example]:
    """Return the examples that a version's card puts into its prompt."""
    prompt = check_card(read_object(card, MAX_CARD_BYTES)).get("prompt", {})
    return [ask(user, answer, "prompt") for user, answer in prompt.get("examples", [])]


def _side_findings(data: Data, recipe: Recipe, report: Report) -> Iterator[Finding]:
    total = len(data.train)
    yield from check_near_duplicates(
        data.train, lambda n: report(Progress("check", n, total, "near duplicates"))
    )
    judged = len(data.validation) + len(data.held_out)
    yield from check_near_leaks(data, lambda n: report(Progress("check", n, judged, "leakage")))
    if recipe.task.metric == "label":
        yield from check_labels(data)


def _measured(
    source: Source, data: Data | None, recipe: Recipe, prompter: Prompter, report: Report
) -> list[Row]:
    """Measure every row; the limit of length holds for what the loss is computed on."""
    learned = (*data.train, *data.validation) if data else source.train
    limited = {id(example) for example in learned}
    rows: list[Row] = []
    for example in source.examples:
        limit = recipe.train.max_length if id(example) in limited else None
        rows.append(measure(example, prompter, limit))
        report(Progress("check", len(rows), len(source.examples), "rows"))
    return rows


def _inspection(
    recipe: Recipe, data: Data | None, rows: Sequence[Row], findings: Sequence[Finding]
) -> Inspection:
    sides: dict[str, tuple[Example, ...]] = {}
    if data is not None:
        sides = {"train": data.train, "validation": data.validation, "held_out": data.held_out}
    labels = {}
    if recipe.task.metric == "label":
        counts = {side: Counter(e.completion for e in rows) for side, rows in sides.items()}
        labels = {side: dict(count.most_common()) for side, count in counts.items()}
    return Inspection(
        rows={side: len(examples) for side, examples in sides.items()},
        groups={side: len({e.group for e in examples}) for side, examples in sides.items()},
        duplicates=data.duplicates if data else 0,
        digest=data.digest if data else None,
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        prompt_tokens=histogram([row.prompt_tokens for row in rows]),
        completion_tokens=histogram([row.completion_tokens for row in rows]),
        labels=labels,
    )


def histogram(counts: Sequence[int]) -> Histogram | None:
    """Return where the counts lie; None of no counts."""
    if not counts:
        return None
    low, high = min(counts), max(counts)
    width = max(1, -(-(high - low + 1) // BINS))
    bins = Counter((count - low) // width for count in counts)
    places = range((high - low) // width + 1)
    return Histogram(
        edges=tuple(low + place * width for place in places),
        counts=tuple(bins[place] for place in places),
        median=sorted(counts)[len(counts) // 2],
        most=high,
    )
