"""What a system prompt can say of the answers: the labels, or the forms of the JSON objects."""

import json
from collections.abc import Sequence
from typing import Any

from training.data.examples import Example
from training.errors import RecipeError
from training.evaluation.metrics import read_json
from training.fewshot.shots import class_of
from training.recipe import FewShot

MAX_LISTED = 100  # labels or forms; more say little and cost much
OPEN = "…"  # stands for a value


def hint_of(settings: FewShot, train: Sequence[Example]) -> str | None:
    """Return the recipe's own text, else one derived from the training side, else None.

    Raises RecipeError when the recipe insists on a list and there is none.
    """
    if settings.labels is False:
        return None
    hint = settings.text or derive_hint(train)
    if hint is None and settings.labels is True:
        raise RecipeError(
            "fewshot.labels = true, and the answers of the training side are no labels and no "
            'JSON objects that a list could name. Say it yourself with fewshot.text = "…".'
        )
    return hint


def derive_hint(train: Sequence[Example]) -> str | None:
    """List the labels or the JSON forms that answers have, in the order of the alphabet.

    None where there are more than MAX_LISTED, or where most answers are unlike any other.
    """
    values = [read_json(example.completion) for example in train]
    objects = [value.value for value in values if value and isinstance(value.value, dict)]
    if len(objects) == len(train):
        listed = _forms([class_of(example) for example in train], objects)
        head = "Answer with JSON of one of these forms:"
    else:
        listed = sorted({example.completion for example in train})
        head = "Answer with one of:"
    if len(listed) > min(MAX_LISTED, len(train) // 2):
        return None
    return "\n".join([head, *listed])


def _forms(classes: Sequence[str], objects: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line a class: its top-level texts, and the keys that its objects have."""
    forms: dict[str, dict[str, Any]] = {}
    for name, value in zip(classes, objects, strict=True):
        form = forms.setdefault(name, {})
        for key, item in value.items():
            form[key] = item if isinstance(item, str) else _merged(form.get(key), item)
    return sorted(
        json.dumps(form, ensure_ascii=False, separators=(",", ":")) for form in forms.values()
    )


def _merged(form: Any, value: Any) -> Any:
    """Add the keys of a nested object to a form; every other value is left open."""
    if not isinstance(value, dict):
        return OPEN
    known = form if isinstance(form, dict) else {}
    return known | {key: _merged(known.get(key), item) for key, item in value.items()}
