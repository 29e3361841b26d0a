"""Make new training rows, keep those that pass the checks, and say of each where it is from."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from training.data.duplicates import NEAR, GramIndex, normalise
from training.data.examples import Data, Example, Turn
from training.data.folder import row_of
from training.data.journal import Journal
from training.data.proposals import Proposal, Propose, is_answer
from training.data.rows import ROW_ERRORS, measure
from training.progress import Progress, Report
from training.prompt import Prompter
from training.recipe import Recipe

CHUNK = 8  # attempts between two writes
GIVE_UP = 200  # attempts in a row that bring nothing

# why a proposal is rejected → what it is, for people; the checks of single rows come first
REASONS = ROW_ERRORS | {
    "control_token": "hold a control token of the base",
    "no_example": "have no whole request and answer in what the model said",
    "no_answer": "have an answer that is no label of the task, or not its JSON",
    "near_leak": "are near a validation or held-out row",
    "duplicate": "ask what a row asks already",
    "near_duplicate": "are near a training row, or one generated before",
}


@dataclass(frozen=True, slots=True)
class Generated:
    """How it went, earlier runs on the same file included."""

    accepted: int
    rejected: dict[str, int]  # reason → rows
    complete: bool  # False: nothing new came any more


class Filter:
    """Lets a proposal pass, or says why not. What it is taught must not come again."""

    def __init__(self, recipe: Recipe, data: Data, prompter: Prompter, near: float) -> None:
        self._recipe, self._prompter, self._near = recipe, prompter, near
        self._labels = {example.completion for example in data.train}
        self._judged = GramIndex(e.prompt for e in (*data.validation, *data.held_out))
        self._known = GramIndex()
        self._texts: set[str] = set()
        for example in data.train:
            self.learn(example)

    def learn(self, example: Example) -> None:
        self._known.add(example.prompt)
        self._texts.add(normalise(example.prompt))

    def reason(self, proposal: Proposal) -> str | None:
        """Return a key of REASONS; None for a proposal that passes."""
        example = proposal.example
        if example is None:
            return "no_example"
        row = measure(example, self._prompter, self._recipe.train.max_length)
        if row.problems:
            return row.problems[0]
        if not is_answer(example.completion, self._recipe.task, self._labels):
            return "no_answer"
        if self._judged.near(example.prompt, NEAR):  # no option can lower this: it would leak
            return "near_leak"
        if normalise(example.prompt) in self._texts:
            return "duplicate"
        return "near_duplicate" if self._known.near(example.prompt, self._near) else None


def generate(
    journal: Journal, wanted: int, propose: Propose, accept: Filter, report: Report
) -> Generated:
    """Fill the journal until it has so many accepted rows, or nothing new comes."""
    for row in journal.accepted:
        accept.learn(_example(row))
    fresh = (attempt for attempt in count() if attempt not in journal.attempts)
    silent = 0
    while len(journal.accepted) < wanted and silent < GIVE_UP:
        report(Progress("generate", len(journal.accepted), wanted, "rows"))
        attempts = list(islice(fresh, CHUNK))
        missing = wanted - len(journal.accepted)
        accepted, rejected = _sort(attempts, propose(attempts), accept, journal.facts, missing)
        journal.record(accepted, rejected)
        silent = 0 if accepted else silent + len(rejected)
    report(Progress("generate", len(journal.accepted), wanted, "rows"))
    complete = len(journal.accepted) >= wanted
    return Generated(len(journal.accepted), dict(journal.reasons.most_common()), complete)


def _sort(
    attempts: list[int],
    proposals: list[Proposal],
    accept: Filter,
    facts: Mapping[str, Any],
    missing: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return accepted and rejected rows; nothing after the last one that is missing."""
    accepted: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for attempt, proposal in zip(attempts, proposals, strict=True):
        if len(accepted) == missing:
            break
        made = {**facts, "attempt": attempt, "from": list(proposal.sources)}
        reason = accept.reason(proposal)
        if reason is None and proposal.example is not None:
            accept.learn(proposal.example)
            accepted.append({**row_of(proposal.example), "made": made})
        else:
            rejected.append({"reason": reason, "said": proposal.raw, "made": made})
    return accepted, rejected


def _example(row: Mapping[str, Any]) -> Example:
    *turns, answer = (Turn(m["role"], m["content"]) for m in row["messages"])
    return Example(tuple(turns), answer.content, row["group"])
