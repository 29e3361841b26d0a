"""Choose which examples to train on: no near duplicates, then as many as are wanted, by a rule.

`diverse` is farthest-first traversal: each next example is the one whose nearest chosen neighbour
is farthest, in Jaccard distance of 3-grams (Gonzalez, Clustering to minimize the maximum
intercluster distance, 1985). It covers the data evenly and likes outliers. `balanced` takes one
example a label in turn. `hard` and `easy` go by what the base model finds unlikely: its mean −log p
of a completion's tokens.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import numpy as np

from training.data.duplicates import GramIndex
from training.data.examples import Example
from training.errors import DataError
from training.recipe import Selection

# Examples → mean −log p of each completion's tokens, in nats.
Difficulty = Callable[[Sequence[Example]], Sequence[float]]


def select(
    kept: Sequence[Example],
    selection: Selection,
    seed: int,
    difficulty: Difficulty | None = None,
) -> list[Example]:
    """Return the chosen training examples in their order; the same seed chooses the same.

    Raises DataError when the rule needs the base's difficulty and none was handed in.
    """
    if selection.rows is None or selection.rows >= len(kept):
        return list(kept)
    match selection.by:
        case "diverse":
            chosen = _diverse(kept, selection.rows, seed)
        case "balanced":
            chosen = _balanced(kept, selection.rows, seed)
        case rule:
            if difficulty is None:
                raise DataError(
                    f"data.selection.by = {rule!r} asks the base model about every row. Do it "
                    "once: wardrobe data split RECIPE --out DIR, then train on the files in DIR."
                )
            sign = -1 if rule == "hard" else 1
            losses = difficulty(kept)
            chosen = sorted(range(len(kept)), key=lambda place: sign * losses[place])
    return [kept[place] for place in sorted(chosen[: selection.rows])]


def without_near(
    train: Sequence[Example], judged: Sequence[Example], threshold: float | None
) -> list[Example]:
    """Leave out what is near a judged example, or near an example that is kept before it.

    Without a threshold nothing is.
    """
    if threshold is None:
        return list(train)
    index = GramIndex(example.prompt for example in judged)
    kept: list[Example] = []
    for example in train:
        if not index.near(example.prompt, threshold):
            kept.append(example)
            index.add(example.prompt)
    return kept


def _diverse(examples: Sequence[Example], rows: int, seed: int) -> list[int]:
    index = GramIndex(example.prompt for example in examples)
    chosen = [random.Random(seed).randrange(len(examples))]  # noqa: S311  # a start, not a secret
    nearest = np.full(len(examples), -1.0)  # similarity to the nearest chosen one
    while len(chosen) < rows:
        nearest = np.maximum(nearest, index.similarities(examples[chosen[-1]].prompt))
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
    return chosen


def _balanced(examples: Sequence[Example], rows: int, seed: int) -> list[int]:
    places = list(range(len(examples)))
    random.Random(seed).shuffle(places)  # noqa: S311  # an order, not a secret
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        by_label[examples[place].completion].append(place)
    rounds = zip_longest(*(by_label[label] for label in sorted(by_label)))
    return [place for place in chain.from_iterable(rounds) if place is not None][:rows]
