"""What a variant forgot: the same general text and questions, to it and to its base.

Perplexity alone misses the usual harm, a model that answers everything in the format of its task;
so the answers are looked at, too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from registry.base import BaseModel
from training.data.duplicates import NEAR, nearest
from training.data.examples import ask
from training.evaluation.evaluate import Answer, Variant, ask_all
from training.evaluation.general import General
from training.evaluation.metrics import plain_label
from training.evaluation.reading import Read, Rows, read_variant
from training.evaluation.statistics import Difference, Interval, Loss, mean_loss, paired, share_of
from training.model import Hardware
from training.progress import Report
from training.prompt import Prompter
from training.recipe import Task

MAX_NEW_TOKENS = 32  # enough for a short answer, and to see its format


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What one variant makes of general text and questions. All intervals are of 95 %."""

    name: str
    text_loss: Loss  # nats a token of general text
    text_change: Loss  # the same less the base's, text by text
    kl: Loss  # KL(base ‖ variant), nats a token of the base's own answers
    answered: Interval  # share of general questions answered right
    answered_change: Difference  # from the base to the variant
    leaked: Interval  # share of general answers in the format of the task
    leaked_change: Difference
    off_is_base: bool | None  # bit for bit with the adapter off; None: there is none to take off
    answers: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.text_loss.value)


def measure_forgetting(
    task: Task,
    completions: Sequence[str],
    base: BaseModel,
    variants: Sequence[Variant],
    prompter: Prompter,
    answer: Answer,
    general: General,
    hardware: Hardware,
    *,
    progress: Report,
) -> list[Forgetting]:
    """Return what the base itself does, and then each variant compared with it.

    `completions` are those of the training side. Whatever has weights of its own is asked under the
    base's default prompt; a prompt is asked as it is, for it is the variant. The text is read
    without any prompt, so a prompt alone does not change its loss.
    """
    asked = [Variant("base", base, ""), *(_as_asked(variant, base) for variant in variants)]
    prompts = [_prompts(variant, prompter, general) for variant in asked]
    outputs = ask_all(
        [(v, prompt) for v, of_one in zip(asked, prompts, strict=True) for prompt in of_one],
        MAX_NEW_TOKENS,
        answer,
        progress=progress,
        text="general questions",
    )
    count = len(general.questions)
    rows = Rows.make(general.texts, prompts[0], outputs[:count], prompter)
    leaks = leak_rule(task, completions)
    seen: list[_Seen] = []
    for number, variant in enumerate(asked):
        said = tuple(map(prompter.answer, outputs[number * count : (number + 1) * count]))
        pairs = zip(general.questions, said, strict=True)
        seen.append(
            _Seen(
                variant,
                said,
                [float(question.answered_by(text)) for question, text in pairs],
                [float(leaks(text)) for text in said],
                read_variant(variant, base, rows, prompts[number], hardware, progress=progress),
            )
        )
    return [_against(one, seen[0]) for one in seen]


def leak_rule(task: Task, completions: Sequence[str]) -> Callable[[str], bool]:
    """Return what tells whether an answer has the format of the task.

    JSON tasks: it begins as an object or a list. Label tasks: it is one of the training labels.
    Others: it is nearly the same text as a training completion.
    """
    if task.metric == "json":
        return lambda answer: answer.lstrip().startswith(("{", "["))
    if task.metric == "label":
        labels = {plain_label(completion) for completion in completions}
        return lambda answer: plain_label(answer) in labels
    kept = sorted(set(completions))
    return lambda answer: nearest([answer], kept)[0] >= NEAR


@dataclass(frozen=True, slots=True)
class _Seen:
    """One variant's values for every question and text."""

    variant: Variant
    answers: tuple[str, ...]
    right: list[float]
    leaked: list[float]
    read: Read


def _as_asked(variant: Variant, base: BaseModel) -> Variant:
    if variant.adapter is not None or variant.model.fingerprint != base.fingerprint:
        return replace(variant, system="", examples=())
    return variant


def _prompts(variant: Variant, prompter: Prompter, general: General) -> list[tuple[int, ...]]:
    asking = replace(prompter, system=variant.system)
    examples = [ask(q.question, q.answers[0], q.question) for q in general.questions]
    return [asking.prompt_ids(variant.turns(example)) for example in examples]


def _against(one: _Seen, base: _Seen) -> Forgetting:
    questions, texts = range(len(one.right)), range(len(one.read.texts))
    change = [
        (nats - of_base, tokens)
        for (nats, tokens), (of_base, _) in zip(one.read.texts, base.read.texts, strict=True)
    ]
    return Forgetting(
        name=one.variant.name,
        text_loss=mean_loss(one.read.texts, texts),
        text_change=mean_loss(change, texts),
        kl=mean_loss(one.read.kl, questions),
        answered=share_of([value == 1 for value in one.right], questions),
        answered_change=paired(base.right, one.right, questions),
        leaked=share_of([value == 1 for value in one.leaked], questions),
        leaked_change=paired(base.leaked, one.leaked, questions),
        off_is_base=one.read.off == base.read.off if one.variant.adapter else None,
        answers=one.answers,
    )
