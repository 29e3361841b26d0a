"""Trains and asks for a comparison: finds again what was done, and keeps to its minutes."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.card import read_card
from training.comparison.result import Forgetting, LeftOut, RunScore
from training.comparison.worker import COST_FILE, Job, Taken, read_taken, train_apart, write_taken
from training.data.examples import Data, Example, digest_examples
from training.errors import RunFailed
from training.evaluation import forgetting
from training.evaluation.evaluate import Answer, Evaluation, Variant, evaluate
from training.evaluation.forgetting import measure_forgetting
from training.evaluation.general import General
from training.evaluation.memory import remembered
from training.extract import Extraction, FineTune, extract
from training.model import Hardware, check_runnable
from training.progress import Progress, Report, Stage
from training.prompt import Prompter, load_prompter
from training.recipe import Recipe
from training.replay import replay_rows
from training.run import replace_file
from training.train import TrainedAdapter

ANSWERS = "base-answers"  # beside the runs, as `wardrobe train` has them
RESERVE = 0.3  # of the minutes, kept for asking the held-out items at the end


@dataclass(frozen=True, slots=True)
class Cell:
    """One finished run."""

    recipe: Recipe
    run: Path
    taken: Taken | None  # None: `wardrobe train` made it, which does not measure

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"


@dataclass(frozen=True, slots=True)
class Judged:
    """What one variant did on some items."""

    values: tuple[float, ...]
    details: dict[str, float]
    prompt_tokens: float  # mean of a request
    answers: tuple[str, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def run(self, seed: int) -> RunScore:
        return RunScore(seed=seed, values=self.values)


class Bench:
    """One comparison at work. What is left out for want of time is in `left_out`."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        base: BaseModel,
        *,
        runs: Path,
        folder: Path,
        hardware: Hardware,
        answer: Answer,
        progress: Report,
        minutes: float | None,
        stage: Stage = "compare",
    ) -> None:
        self.recipe, self.data, self.base = recipe, data, base
        self.runs, self.folder, self.hardware = runs, folder, hardware
        self.left_out: list[LeftOut] = []
        self.prompter: Prompter = load_prompter(base.path, recipe.task.system)
        # A run that replays finds there what the base says: nobody can be asked in its process.
        self.answer = remembered(runs / ANSWERS, base, answer)
        self.progress = progress
        self._minutes = minutes
        self._stage: Stage = stage
        self._started = time.monotonic()
        self._per_row: dict[str, float] = {}  # kind → the most seconds a training row took
        self._done, self._cells = 0, 0

    def expect(self, cells: int) -> None:
        """Say how many cells the plan has."""
        self._cells = cells
        self._tell()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def train(self, name: str, recipe: Recipe, data: Data | None = None) -> Cell | None:
        """Train one cell, or find it again; None when minutes or machine do not allow it."""
        data = data or self.data
        note = self.folder / "cells" / f"{self._key(recipe, data)}.json"
        known = json.loads(note.read_text()) if note.is_file() else None
        if known and (self.runs / known / "adapter").is_dir():
            run = self.runs / known
        elif reason := self._forbids(recipe):
            self.left_out.append(LeftOut(cell=name, reason=reason))
            self._count()
            return None
        else:
            run = self._trained(name, recipe, data)
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_file(note, json.dumps(run.name).encode())
        self._count()
        return Cell(recipe, run, read_taken(run))

    def variant(self, cell: Cell, name: str) -> Variant:
        """Return the way to answer with a finished run."""
        return Variant.trained(name, self.base, self.recipe.task.system, cell.adapter)

    def extract(self, full: Cell, rank: int) -> Cell:
        """Make an adapter of a full fine-tune, or find it again; it costs what both took."""
        started = time.process_time()
        wanted = Extraction.of(rank, None)
        tuned = FineTune.in_folder(full.adapter)
        made = extract(tuned, self.base, self.runs, wanted, progress=self.progress)
        run = made.folder.parent
        if full.taken and not (run / COST_FILE).is_file():
            spent = full.taken.cpu_seconds + time.process_time() - started
            write_taken(run, replace(full.taken, cpu_seconds=round(spent, 2)))
        return Cell(full.recipe, run, read_taken(run))

    def remember_replay(self, recipe: Recipe) -> None:
        """Let the base answer what a run will replay."""
        replay_rows(recipe, self.base, self.answer, self.progress)

    def again(self, cell: Cell) -> TrainedAdapter:
        """Return a finished run as `train` would, found again."""
        card = read_card(cell.adapter)
        return TrainedAdapter(cell.adapter, card, dropped=0, reused=True, curve=None)

    def forgetting(self, variants: Sequence[Variant], general: General) -> list[Forgetting]:
        """Return what the base itself knows, and then each variant; what is known is not asked."""
        plain = Variant("base", self.base, "")
        wanted = [plain, *variants]
        paths = [self._judged_path(variant, general) for variant in wanted]
        new = [i for i, path in enumerate(paths) if i and not path.is_file()]
        if new or not paths[0].is_file():
            found = measure_forgetting(
                self.recipe.task,
                [example.completion for example in self.data.train],
                self.base,
                [wanted[i] for i in new],
                self.prompter,
                self.answer,
                general,
                self.hardware,
                progress=self.progress,
            )
            for i, one in zip([0, *new], found, strict=True):
                self._keep(paths[i], _kept(one))
        return [msgspec.json.decode(path.read_bytes(), type=Forgetting) for path in paths]

    def judge(self, variants: Sequence[Variant], items: Sequence[Example]) -> list[Judged]:
        """Ask the variants the items: all that were not asked before in one mixed batch."""
        paths = [self._judged_path(variant, items) for variant in variants]
        new = [i for i, path in enumerate(paths) if not path.is_file()]
        if new:
            evaluations = evaluate(
                self.recipe,
                items,
                [variants[i] for i in new],
                self.prompter,
                self.answer,
                progress=self.progress,
            )
            for i, evaluation in zip(new, evaluations, strict=True):
                self._keep(paths[i], _judged(evaluation))
        return [msgspec.json.decode(path.read_bytes(), type=Judged) for path in paths]

    def _trained(self, name: str, recipe: Recipe, data: Data) -> Path:
        def report(progress: Progress) -> None:
            self.progress(replace(progress, text=name))

        started = time.monotonic()
        job = Job(recipe, data, self.base, self.runs, self.runs / ANSWERS)
        trained = train_apart(job, report)
        if not trained.reused:
            rows = recipe.train.steps * recipe.train.batch_size
            kind = recipe.method.kind
            seconds = (time.monotonic() - started) / rows
            self._per_row[kind] = max(seconds, self._per_row.get(kind, 0.0))
        return trained.folder.parent

    def _forbids(self, recipe: Recipe) -> str:
        """Return why a cell cannot be run here and now, or nothing.

        Whether it fits is told by the slowest run of its kind so far, else of any kind.
        """
        try:
            check_runnable(recipe.method, self.hardware)
        except RunFailed as error:
            return error.message
        if self._minutes is None:
            return ""
        slowest = max(self._per_row.values(), default=0.0)
        per_row = self._per_row.get(recipe.method.kind, slowest)
        needed = per_row * recipe.train.steps * recipe.train.batch_size
        fits = self.seconds + needed <= 60 * self._minutes * (1 - RESERVE)
        return "" if fits else f"no time left of {self._minutes:g} minutes"

    def _key(self, recipe: Recipe, data: Data) -> str:
        facts = {
            "recipe": recipe.digest,
            "data": data.digest,
            "base": self.base.fingerprint,
            "hardware": asdict(self.hardware),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        }
        return hashlib.sha256(canonical(facts)).hexdigest()[:16]

    def _judged_path(self, variant: Variant, asked: Sequence[Example] | General) -> Path:
        """Name the answers by what they depend on; a run's folder is named by its own facts."""
        facts: dict[str, Any] = {
            "model": variant.model.fingerprint,
            "adapter": str(variant.adapter) if variant.adapter else None,
            "system": variant.system,
            "examples": [list(example) for example in variant.examples],
            "items": _digest(asked),
            "recipe": self.recipe.digest,  # how answers are judged, a function's file included
            "torch": version("torch"),
        }
        name = hashlib.sha256(canonical(facts)).hexdigest()[:16]
        return self.folder / "judged" / f"{name}.json"

    def _keep(self, path: Path, found: Judged | Forgetting) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, msgspec.json.encode(found))

    def _count(self) -> None:
        self._done += 1
        self._tell()

    def _tell(self) -> None:
        self.progress(Progress(self._stage, self._done, self._cells, "cells"))


def _judged(evaluation: Evaluation) -> Judged:
    items = evaluation.items
    return Judged(
        values=tuple(evaluation.values),
        details={key: share.value for key, share in evaluation.score.details.items()},
        prompt_tokens=sum(item.prompt_tokens for item in items) / len(items),
        answers=tuple(item.answer for item in items),
    )


def _kept(found: forgetting.Forgetting) -> Forgetting:
    return Forgetting(
        perplexity=found.perplexity,
        qa_accuracy=found.answered.value,
        qa_low=found.answered.low,
        qa_high=found.answered.high,
        format_leak=found.leaked.value,
        kl=found.kl.value,
    )


def _digest(asked: Sequence[Example] | General) -> str:
    if isinstance(asked, General):
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()
    return digest_examples((), asked)
