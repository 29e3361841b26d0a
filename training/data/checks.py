"""What can be wrong with data, as functions that return findings.

An *error* is what `wardrobe train` refuses, or what would make it train or measure another thing
than the recipe says. A *warning* is for people to judge: training goes on.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from training.data.duplicates import NEAR, GramIndex, normalise
from training.data.examples import Data, Example
from training.data.rows import ROW_ERRORS, Row
from training.data.source import Source
from training.errors import BadRow

SHOWN = 5  # rows that a finding names
IMBALANCE = 10.0  # times as many rows of the most frequent label as of the rarest

Done = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, and the first rows that show it."""

    code: str
    severity: Literal["error", "warning"]
    sentence: str
    rows: tuple[str, ...] = ()  # FILE:LINE and what stands there, the first few
    count: int = 1  # of all such rows


def check_reading(bad: Sequence[BadRow]) -> Iterator[Finding]:
    """Rows that are no examples, by what is wrong with them."""
    for kind, rows in _by(bad, lambda row: row.kind).items():
        yield _rows_finding(kind, [row.message for row in rows])


def check_rows(rows: Sequence[Row], max_length: int, too_long: str) -> Iterator[Finding]:
    """Empty texts, stop and control tokens, a template that changes them, too many tokens."""
    found: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for problem in row.problems:
            found[problem].append(row)
    for code in (*ROW_ERRORS, "control_token"):
        shown = [f"{show(row.example)} ({row.tokens} tokens)" for row in found[code]]
        if not shown:
            continue
        if code == "control_token":
            sentence = f"{len(shown)} rows hold a control token of the base as text."
            yield _finding(code, "warning", sentence, shown)
        elif code == "too_long" and too_long == "drop":
            sentence = f"{len(shown)} rows are over {max_length} tokens and will be dropped."
            yield _finding(code, "warning", sentence, shown)
        else:
            yield _rows_finding(code, shown)


def check_repetitions(source: Source) -> Iterator[Finding]:
    """Prompts that stand twice: on one side, on two sides, or with two answers."""
    repeated: list[str] = []
    leaked: list[str] = []
    contradicted: list[str] = []
    first: dict[str, tuple[str, Example]] = {}
    # What is held out comes first: it is the training row that is left out.
    for side in ("held_out", "validation", "train"):
        for example in getattr(source, side) or ():
            before, other = first.setdefault(normalise(example.prompt), (side, example))
            if other is example:
                continue
            shown = f"{show(example)} = {other.where or f'another {side_name(before)} row'}"
            (repeated if before == side else leaked).append(shown)
            if normalise(other.completion) != normalise(example.completion):
                answers = f"{_short(other.completion)} and {_short(example.completion)}"
                contradicted.append(f"{shown}: {answers}")
    if leaked:
        sentence = "rows ask what another side asks too. They are left out of training."
        yield _finding("leak", "warning", f"{len(leaked)} {sentence}", leaked)
    if repeated:
        sentence = "rows repeat the prompt of an earlier one. Only the first is used."
        yield _finding("duplicate", "warning", f"{len(repeated)} {sentence}", repeated)
    if contradicted:
        sentence = "rows have the prompt of another row and a different answer."
        yield _finding("contradiction", "warning", f"{len(contradicted)} {sentence}", contradicted)


def check_groups(source: Source) -> Iterator[Finding]:
    """Groups on two of the sides that the source names itself."""
    sides = {
        side: {example.group for example in getattr(source, side) or ()}
        for side in ("train", "validation", "held_out")
    }
    for one, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        if shared := sorted(sides[one] & sides[other]):
            sentence = f"{len(shared)} groups stand in {side_name(one)} and {side_name(other)}."
            yield _finding("group_leak", "error", sentence, [_short(name) for name in shared])


def check_near_duplicates(train: Sequence[Example], done: Done) -> Iterator[Finding]:
    """Training rows that are nearly an earlier one."""
    index, shown = GramIndex(), list[str]()
    for place, example in enumerate(train):
        if near := index.near(example.prompt):
            other, alike = max(near, key=lambda found: found[1])
            shown.append(f"{show(example)} ≈ {show(train[other])} ({alike:.2f})")
        index.add(example.prompt)
        done(place + 1)
    if shown:
        share = f"{len(shown)} of {len(train)} training rows are near duplicates of an earlier one"
        sentence = f"{share} ({NEAR:g} or more of their 3-grams are shared)."
        yield _finding("near_duplicate", "warning", sentence, shown)


def check_near_leaks(data: Data, done: Done) -> Iterator[Finding]:
    """Rows to judge by that are nearly a training row."""
    index = GramIndex(example.prompt for example in data.train)
    count = 0
    for side in ("validation", "held_out"):
        examples: tuple[Example, ...] = getattr(data, side)
        shown: list[str] = []
        for example in examples:
            if near := index.near(example.prompt):
                other, alike = max(near, key=lambda found: found[1])
                shown.append(f"{show(example)} ≈ {show(data.train[other])} ({alike:.2f})")
            done(count := count + 1)
        if shown:
            sentence = (
                f"{len(shown)} of {len(examples)} {side_name(side)} rows have a near duplicate in "
                "training: on these the metric measures memory. Give rows that say nearly the "
                f"same one data.group, or set data.selection.near_duplicates = {NEAR:g}."
            )
            yield _finding("near_leak", "warning", sentence, shown)


def check_examples_in_prompt(shots: Sequence[Example], data: Data) -> Iterator[Finding]:
    """Few-shot examples that are, or nearly are, what the prompt is judged on."""
    index = GramIndex(example.prompt for example in data.held_out)
    shown = [
        f"{show(shot)} ≈ {show(data.held_out[place])} ({alike:.2f})"
        for shot in shots
        for place, alike in index.near(shot.prompt)
    ]
    if shown:
        sentence = f"{len(shown)} examples in the prompt are held-out rows, or nearly."
        yield _finding("prompt_leak", "error", sentence, shown)


def check_labels(data: Data) -> Iterator[Finding]:
    """Labels that training never sees, and labels that it sees far more often than others."""
    counts = Counter(example.completion for example in data.train)
    for side in ("validation", "held_out"):
        unseen = [show(e) for e in getattr(data, side) if e.completion not in counts]
        if unseen:
            sentence = f"{len(unseen)} {side_name(side)} rows have a label that training lacks."
            yield _finding("unseen_label", "warning", sentence, unseen)
    (most, high), (least, low) = counts.most_common(1)[0], counts.most_common()[-1]
    if high >= IMBALANCE * low:
        sentence = f"The label {most!r} has {high} training rows and {least!r} has {low}."
        yield Finding("imbalance", "warning", sentence)


def show(example: Example) -> str:
    """Return where an example stands, and how it begins."""
    return f"{example.where} {_short(example.text)}".strip()


def side_name(side: str) -> str:
    return {"train": "training", "held_out": "held-out"}.get(side, side)


def _rows_finding(code: str, rows: Sequence[str]) -> Finding:
    sentence = f"{len(rows)} rows {ROW_ERRORS[code]}."
    return _finding(code, "error", sentence, rows)


def _finding(
    code: str, severity: Literal["error", "warning"], sentence: str, rows: Sequence[str]
) -> Finding:
    return Finding(code, severity, sentence, tuple(rows[:SHOWN]), len(rows))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _by(rows: Sequence[BadRow], key: Callable[[BadRow], str]) -> dict[str, list[BadRow]]:
    groups: defaultdict[str, list[BadRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups
