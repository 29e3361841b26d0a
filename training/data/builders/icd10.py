"""Diagnosis texts and the ICD-10-CM chapter each belongs to, from `simple-icd-10-cm`.

The three-character category is the group: every text of a held-out category is new to training.
"""

import random
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from training.data.examples import Example, ask
from training.recipe import Count

_CODE_RANGE = re.compile(r" \([A-Z0-9]+-[A-Z0-9]+\)$")


@dataclass(frozen=True, slots=True)
class Icd10Options:
    """What `[data.options]` may say."""

    categories_per_chapter: Count = 40
    codes_per_category: Count = 1


def build_icd10(options: Icd10Options, seed: int) -> list[Example]:
    """Return diagnosis texts with the title of their chapter, without its range of codes."""
    icd = _load_codes()
    rng = random.Random(seed)  # noqa: S311  # draws examples, not secrets
    examples: list[Example] = []
    for chapter, categories in _chapters(icd).items():
        title = _CODE_RANGE.sub("", icd.get_description(chapter))
        chosen = rng.sample(categories, min(len(categories), options.categories_per_chapter))
        for category in chosen:
            texts = sorted(
                {icd.get_description(code) for code in [category, *icd.get_descendants(category)]}
            )
            drawn = rng.sample(texts, min(len(texts), options.codes_per_category))
            examples += [ask(text, title, category) for text in drawn]
    return examples


def _chapters(icd: Any) -> dict[str, list[str]]:
    """Return chapter → its three-character categories."""
    chapters: dict[str, list[str]] = defaultdict(list)
    for code in icd.get_all_codes():
        if icd.is_category(code):
            chapters[icd.get_ancestors(code)[-1]].append(code)
    return dict(chapters)


def _load_codes() -> Any:
    """Import the package, which parses its tables on import (about two seconds)."""
    with warnings.catch_warnings():
        # It reads its files with functions that Python 3.11 deprecates.
        warnings.filterwarnings("ignore", "(open|read)_text is deprecated", DeprecationWarning)
        return import_module("simple_icd_10_cm")
