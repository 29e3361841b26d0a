"""What a comparison found: plain facts, as they stand in report.json.

A row is one way to answer: a prompt, or a method with the learning rate that validation chose. It
has one run for each training seed (or draw of few-shot examples), and every run has one value for
each held-out item, in the same order in every row, so that any two rows can be compared in pairs.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from training.run import replace_file

FILE = "report.json"

Strategy = Literal["prompt", "few-shot", "LoRA", "PEFT variant", "full", "extracted", "replay"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunScore:
    """One trained run, or one draw of examples for the prompt."""

    seed: int
    values: tuple[float, ...]  # between 0 and 1, one for each held-out item

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run costs to make, to keep and to ask. None: not measured."""

    prompt_tokens: float  # mean of a request, over the held-out items
    trainable: int = 0  # parameters
    bytes: int = 0  # of what is stored and shipped
    train_flops: float = 0.0  # of one run
    cpu_seconds: float | None = 0.0  # of the process that trained it, all threads
    gpu_seconds: float | None = None
    search_cpu_seconds: float | None = 0.0  # of all runs trained to choose it, its own included
    peak_bytes: int | None = None  # resident memory of the process that trained it


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """What is left of the base's general ability."""

    perplexity: float  # on general text
    qa_accuracy: float  # of general questions, between 0 and 1
    qa_low: float  # its 95 % interval
    qa_high: float
    format_leak: float  # share of general answers in the format of the task
    kl: float  # nats a token to the base, on general prompts; 0 is the base itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to answer, judged."""

    name: str
    strategy: Strategy
    settings: str  # what was chosen or fixed, for people: "lr 5e-4, r 16"
    runs: tuple[RunScore, ...]
    cost: Cost
    hot_swaps: bool = True  # can be worn by one request of a mixed batch
    details: dict[str, float] = field(default_factory=dict[str, float])
    forgetting: Forgetting | None = None
    ship: str = ""  # the command that makes a version of it

    @property
    def value(self) -> float:
        return sum(run.mean for run in self.runs) / len(self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two rows on the same items. `difference` is `first` minus `second`."""

    first: str
    second: str
    difference: float
    low: float  # of the 95 % interval of the difference
    high: float
    wins: int  # items where `first` is better
    losses: int
    p: float
    p_holm: float  # corrected for all pairs of the table
    items_needed: int | None  # for 80 % power, were the difference real; None: seeds decide
    test: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One point of a curve: the metric of one row at one x."""

    series: str
    x: float
    runs: tuple[RunScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """One learning rate of a grid and its metric on the validation side."""

    row: str
    learning_rate: float
    value: float
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A cell of the plan that was not run, and why."""

    cell: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The comparison in words. `winner` only where the data supports one."""

    headline: str
    findings: tuple[str, ...]
    best: str
    winner: str | None
    level: tuple[str, ...]  # rows not told apart from the best, itself included
    ship: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How it was measured."""

    recipe: str
    base: str
    parameters: int  # of the base
    metric: str
    train_examples: int
    validation_examples: int
    held_out_examples: int
    steps: int
    batch_size: int
    seeds: int
    quick: bool
    date: str
    machine: str
    versions: dict[str, str]
    data_sha256: str
    minutes: float  # of the call that finished it


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything a report shows. Items are in one order everywhere."""

    setup: Setup
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    verdict: Verdict
    untouched: Forgetting | None = None  # the base without prompt and adapter
    groups: tuple[int, ...]  # of each held-out item; items of one group go together
    near: tuple[bool, ...] = ()  # held-out items with a near-duplicate in training
    searched: tuple[Searched, ...] = ()
    by_examples: tuple[Point, ...] = ()
    by_rank: tuple[Point, ...] = ()
    losses: dict[str, tuple[tuple[int, float], ...]] = field(
        default_factory=dict[str, tuple[tuple[int, float], ...]]
    )  # row → (step, loss) of its first seed
    left_out: tuple[LeftOut, ...] = ()

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def read_comparison(folder: Path) -> Comparison:
    return msgspec.json.decode((folder / FILE).read_bytes(), type=Comparison)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    value: Any = msgspec.to_builtins(comparison)
    replace_file(folder / FILE, msgspec.json.format(msgspec.json.encode(value), indent=1))
