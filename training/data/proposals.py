"""Three ways to propose new examples. An attempt's number and the seed decide what is proposed.

*paraphrase* keeps an example's answer and asks for its question in other words; the new row is in
the old one's group, so that no split can part them. *self-instruct* shows a few examples and asks
for another one (Wang et al., Self-Instruct, 2023). *templates* fills the slots of sentences. None
of them sees anything but the training side.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.data.duplicates import normalise
from training.data.endpoint import Answer, Endpoint, Question
from training.data.examples import Example, Turn, ask
from training.data.templates import Templates
from training.evaluation.metrics import read_json
from training.recipe import Task

SHOTS = 4  # examples that self-instruct shows
PARAPHRASE = (
    "Rewrite the user's message in other words. Keep its meaning, every name and every number. "
    "Answer with the rewritten message only."
)
INSTRUCT = (
    "Here are requests and the right answers to them. Write one more request that is different "
    "from all of these, and its answer, in the same form.\n\nThe task: {system}"
)
_FORM = re.compile(r"Request: *(.+?)\s*\nAnswer: *(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one attempt brought."""

    example: Example | None  # None: the answer had no whole example in it
    sources: tuple[str, ...]  # the training rows it was made from
    raw: str  # what the model said


# Numbers of attempts → what each brings, in order.
Propose = Callable[[Sequence[int]], list[Proposal]]


def from_templates(templates: Templates, seed: int) -> Propose:
    def propose(attempts: Sequence[int]) -> list[Proposal]:
        drawn = [templates.draw(_rng(seed, attempt)) for attempt in attempts]
        return [Proposal(example, (example.group,), example.prompt) for example in drawn]

    return propose


def by_paraphrase(train: Sequence[Example], endpoint: Endpoint, seed: int) -> Propose:
    def propose(attempts: Sequence[int]) -> list[Proposal]:
        chosen = [_rng(seed, attempt).choice(train) for attempt in attempts]
        answers = endpoint.ask(
            [
                Question([("system", PARAPHRASE), ("user", example.text)], seed + attempt)
                for example, attempt in zip(chosen, attempts, strict=True)
            ]
        )
        return [_reworded(*pair) for pair in zip(chosen, answers, strict=True)]

    return propose


def by_self_instruct(
    train: Sequence[Example], endpoint: Endpoint, task: Task, seed: int
) -> Propose:
    system = INSTRUCT.format(system=task.system)

    def propose(attempts: Sequence[int]) -> list[Proposal]:
        shown = [_rng(seed, attempt).sample(train, min(SHOTS, len(train))) for attempt in attempts]
        answers = endpoint.ask(
            [
                Question([("system", system), ("user", _listed(shots))], seed + attempt)
                for shots, attempt in zip(shown, attempts, strict=True)
            ]
        )
        return [_instructed(*pair) for pair in zip(shown, answers, strict=True)]

    return propose


def is_answer(completion: str, task: Task, labels: set[str]) -> bool:
    """Tell whether an answer can be one to the task: a known label, or JSON where that is asked."""
    if task.metric == "label":
        return completion in labels
    return task.metric != "json" or read_json(completion) is not None


def _reworded(example: Example, answer: Answer) -> Proposal:
    turns = (*example.turns[:-1], Turn("user", answer.text.strip()))
    made = Example(turns, example.completion, example.group)
    return Proposal(made if answer.whole else None, (named(example),), answer.text)


def _instructed(shots: Sequence[Example], answer: Answer) -> Proposal:
    sources = tuple(map(named, shots))
    found = _FORM.search(answer.text)
    if found is None or not answer.whole:
        return Proposal(None, sources, answer.text)
    text, completion = found[1].strip(), found[2].strip()
    return Proposal(ask(text, completion, group=normalise(text)), sources, answer.text)


def _listed(shots: Sequence[Example]) -> str:
    return "\n\n".join(f"Request: {shot.text}\nAnswer: {shot.completion}" for shot in shots)


def named(example: Example) -> str:
    """Return what finds an example again: its file and line, or its text."""
    return example.where or example.prompt


def _rng(seed: int, attempt: int) -> random.Random:
    return random.Random(f"{seed}:{attempt}")  # noqa: S311  # draws examples, not secrets
