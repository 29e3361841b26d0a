"""How one answer is judged, and what many judged answers add up to.

Every metric gives an answer a value between 0 and 1 (0 or 1 where it is right or wrong), and the
score is their mean. No model judges another one.
"""

import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.examples import Example
from training.errors import DataError, TrainingError
from training.evaluation.statistics import Interval, folded, mean_of, share_of
from training.evaluation.userfunction import load_function
from training.recipe import Recipe

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer, judged. `value` is the recipe's metric; `facts` explain it."""

    value: float
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def correct(self) -> bool:
        return self.value == 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """What the verdicts of one variant add up to."""

    correct: int
    total: int
    groups: int
    share: Interval  # the mean value: of a metric that is right or wrong, the share of right ones
    details: dict[str, Interval]  # further metrics of the same answers, between 0 and 1
    errors: int = 0  # answers that the user's function could not judge; they count as wrong


Judge = Callable[[Example, str], Verdict]


def judge(recipe: Recipe) -> Judge:
    """Return the function (example, answer) → verdict. Raises RecipeError for a bad function."""
    match recipe.task.metric:
        case "exact":
            return judge_exact
        case "label":
            return judge_label
        case "json":
            return judge_json
        case "rouge-l":
            return judge_rouge_l
        case "chrf":
            return chrf_judge()
        case "function":
            assert recipe.task.function, "the recipe was checked to name one"
            return function_judge(load_function(recipe.folder, recipe.task.function))


def judge_exact(example: Example, answer: str) -> Verdict:
    """Equal but for space around it."""
    return Verdict(answer.strip() == example.completion.strip())


def judge_label(example: Example, answer: str) -> Verdict:
    """Equal but for case, spacing and a final full stop."""
    said, label = plain_label(answer), plain_label(example.completion)
    return Verdict(float(said == label), {"said": said, "label": label})


def plain_label(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


def judge_json(example: Example, answer: str) -> Verdict:
    """Equal as JSON values, whatever the order of keys; true is not 1.

    The facts count the leaves, each a path and a value, that are right, said and true; and, where
    the expected object has them, whether `intent` is equal and the same counts for its `slots`.
    """
    truth = read_json(example.completion)
    if truth is None:
        raise DataError(
            f"The expected answer {example.completion!r} is no JSON, and task.metric is json."
        )
    given = read_json(answer)
    said = given.value if given else None
    facts: dict[str, Any] = {"valid": given is not None}
    facts |= _counts("fields", leaves(said) if given else set(), leaves(truth.value))
    if isinstance(truth.value, dict) and "intent" in truth.value:
        facts["intent"] = isinstance(said, dict) and said.get("intent") == truth.value["intent"]
    if isinstance(truth.value, dict) and isinstance(truth.value.get("slots"), dict):
        facts |= _counts("slots", _slots(said), _slots(truth.value))
    return Verdict(float(given is not None and given.text == truth.text), facts)


@dataclass(frozen=True, slots=True)
class Json:
    """A JSON value, and the text that all values equal to it have in common."""

    value: Any
    text: str


def read_json(text: str) -> Json | None:
    """Return what the text holds, or None where it is no JSON or is nested beyond reading."""
    try:
        value = json.loads(text)
        return Json(value, json.dumps(value, sort_keys=True))
    except (ValueError, RecursionError):
        return None


def leaves(value: Any) -> set[tuple[str, str]]:
    """Return (path, value as JSON) of everything that is no container, and of empty containers."""
    found: set[tuple[str, str]] = set()
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:  # no recursion: the depth is the model's to choose
        path, here = waiting.pop()
        if isinstance(here, dict) and here:
            waiting += [(f"{path}.{key}", item) for key, item in here.items()]
        elif isinstance(here, list) and here:
            waiting += [(f"{path}[{place}]", item) for place, item in enumerate(here)]
        else:
            found.add((path, json.dumps(here)))
    return found


def judge_rouge_l(example: Example, answer: str) -> Verdict:
    """F1 of the longest common subsequence of words: C. Lin, ROUGE, 2004, section 3.

    Words are runs of letters and digits without case, and are not stemmed.
    """
    said, truth = _words(answer), _words(example.completion)
    if not said or not truth:
        return Verdict(float(said == truth))
    return Verdict(2 * longest_common(said, truth) / (len(said) + len(truth)))


def longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Bits of one integer are the columns of the usual table: H. Hyyrö, Bit-Parallel LCS-length
    Computation Revisited, 2004.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(first) - row.bit_count()


def chrf_judge() -> Judge:
    """chrF of one sentence: M. Popović, chrF, 2015, as sacrebleu computes it; a share, not %."""
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ModuleNotFoundError as error:
        raise TrainingError(
            "task.metric = \"chrf\" needs the package sacrebleu: pip install 'wardrobe[text]'."
        ) from error
    chrf = CHRF()
    return lambda example, answer: Verdict(
        chrf.sentence_score(answer, [example.completion]).score / 100
    )


def function_judge(function: Callable[[str, str, str], object]) -> Judge:
    """Ask the user's function for True or False; whatever else it does fails that answer."""

    def run(example: Example, answer: str) -> Verdict:
        try:
            passed = function(example.text, answer, example.completion)
        except (Exception, SystemExit) as error:  # whatever it raises is about this answer alone
            return Verdict(0.0, {"error": f"{type(error).__name__}: {error}"})
        if not isinstance(passed, bool):
            return Verdict(0.0, {"error": f"It returned {passed!r:.100}, not True or False."})
        return Verdict(float(passed))

    return run


def score(verdicts: Sequence[Verdict], groups: Sequence[Hashable]) -> Score:
    """Add up verdicts of one metric; `groups` says which items go together."""
    values = [float(verdict.value) for verdict in verdicts]
    binary = all(value in (0.0, 1.0) for value in values)
    return Score(
        correct=sum(verdict.correct for verdict in verdicts),
        total=len(verdicts),
        groups=len(set(groups)),
        share=share_of([value == 1 for value in values], groups)
        if binary
        else mean_of(values, groups),
        details=_details(verdicts, groups),
        errors=sum("error" in verdict.facts for verdict in verdicts),
    )


def _details(verdicts: Sequence[Verdict], groups: Sequence[Hashable]) -> dict[str, Interval]:
    """Return what the facts add up to: a fact counts where every verdict has it."""
    common = set.intersection(*(set(verdict.facts) for verdict in verdicts))
    found: dict[str, Interval] = {}
    for name, fact in (("valid_json", "valid"), ("intent_accuracy", "intent")):
        if fact in common:
            found[name] = share_of([verdict.facts[fact] for verdict in verdicts], groups)
    for name, fact in (("field_f1", "fields"), ("slot_f1", "slots")):
        keys = [f"{fact}_{kind}" for kind in ("right", "said", "true")]
        if common.issuperset(keys):
            counts = np.array([[float(v.facts[key]) for key in keys] for v in verdicts])
            found[name] = folded(counts, groups, _micro_f1)
    if "label" in common:
        found["macro_f1"] = folded(_label_counts(verdicts), groups, _macro_f1)
    return found


def _counts(name: str, said: set[Any], true: set[Any]) -> dict[str, int]:
    return {
        f"{name}_right": len(said & true),
        f"{name}_said": len(said),
        f"{name}_true": len(true),
    }


def _slots(value: Any) -> set[tuple[str, str]]:
    """Return (name, value) pairs; the value as JSON, so that 1 and "1" differ."""
    slots = value.get("slots") if isinstance(value, dict) else None
    if not isinstance(slots, dict):
        return set()
    return {(name, json.dumps(item, sort_keys=True)) for name, item in slots.items()}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _label_counts(verdicts: Sequence[Verdict]) -> Array:
    """Return [items, 3·labels]: hits, said and true, for each label that is expected anywhere."""
    labels = sorted({verdict.facts["label"] for verdict in verdicts})
    true = np.array([[v.facts["label"] == label for label in labels] for v in verdicts], float)
    said = np.array([[v.facts["said"] == label for label in labels] for v in verdicts], float)
    return np.hstack([true * said, said, true])


def _micro_f1(sums: Array) -> Array:
    """2·precision·recall / (precision + recall) over all, which is 2·right / (said + true)."""
    both = sums[..., 1] + sums[..., 2]
    return np.where(both > 0, 2 * sums[..., 0] / np.maximum(both, 1), 1.0)


def _macro_f1(sums: Array) -> Array:
    """Return the mean F1 of the labels that are expected; an answer beyond them is only a miss."""
    hits, said, true = np.split(sums, 3, axis=-1)
    expected = true > 0
    f1 = 2 * hits / np.maximum(said + true, 1)
    return np.where(expected, f1, 0).sum(axis=-1) / expected.sum(axis=-1)
