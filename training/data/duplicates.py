"""Texts that say the same: equal but for case and spacing, or nearly equal letter for letter.

Two texts are compared by the sets of their character 3-grams: Jaccard's index, shared grams over
all grams. From `NEAR` on they count as near duplicates. Every answer is exact: grams are counted
through an inverted index, so nothing is estimated and nothing depends on a seed.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEAR = 0.6  # of Jaccard's index: "turn on the lamp" and "turn on the red lamp" have 0.68

_COMMON = 0.6  # share of the grams needed that a first look may leave out; by measurement
_NONE = np.empty(0, dtype=np.intc)


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """Two texts that are alike, by their places in the lists that were given."""

    first: int
    second: int
    similarity: float  # 0 nothing in common … 1 the same grams


def normalise(text: str) -> str:
    """Return the text without differences of case and spacing."""
    return " ".join(text.casefold().split())


def trigrams(text: str) -> frozenset[str]:
    """Return the 3-grams of a normalised text; a shorter one is a gram of its own."""
    text = normalise(text)
    if len(text) < 3:
        return frozenset([text])
    return frozenset(text[place : place + 3] for place in range(len(text) - 2))


def similarity(a: str, b: str) -> float:
    """Return Jaccard's index of the two sets of 3-grams, between 0 and 1."""
    return _jaccard(trigrams(a), trigrams(b))


def nearest(texts: Sequence[str], others: Sequence[str]) -> list[float]:
    """Return for each text its similarity to the most similar of the others; 0 if there is none."""
    index = GramIndex(others)
    return [float(index.similarities(text).max(initial=0.0)) for text in texts]


def near_pairs(
    texts: Sequence[str], threshold: float = NEAR, done: Callable[[int], None] = lambda _: None
) -> list[Pair]:
    """Return the pairs within one list that are at least so similar, `first` before `second`.

    `done` is told how many texts have been compared. 20,000 questions of 60 letters take seconds,
    20,000 texts of 900 letters about a minute.
    """
    index = GramIndex()
    pairs: list[Pair] = []
    for place, text in enumerate(texts):
        pairs += (Pair(found, place, alike) for found, alike in index.near(text, threshold))
        index.add(text)
        done(place + 1)
    return sorted(pairs)


def near_across(
    texts: Sequence[str],
    others: Sequence[str],
    threshold: float = NEAR,
    done: Callable[[int], None] = lambda _: None,
) -> list[Pair]:
    """Return the pairs that are at least so similar: `first` of the texts, `second` of the others.

    `done` is told how many of the texts have been compared.
    """
    index = GramIndex(others)
    pairs: list[Pair] = []
    for place, text in enumerate(texts):
        pairs += (Pair(place, found, alike) for found, alike in index.near(text, threshold))
        done(place + 1)
    return pairs


class GramIndex:
    """Texts by the 3-grams they hold; it grows at its end."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._postings: defaultdict[str, array[int]] = defaultdict(lambda: array("i"))
        self._grams: list[frozenset[str]] = []
        self._lengths = array("i")  # of the sets of grams
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Append a text; its place is the number of texts before it."""
        grams = trigrams(text)
        for gram in grams:
            self._postings[gram].append(len(self._grams))
        self._grams.append(grams)
        self._lengths.append(len(grams))

    def similarities(self, text: str) -> NDArray[np.float64]:
        """Return the similarity of a text to every text of the index, by place."""
        grams = trigrams(text)
        shared = self._count(grams)
        return shared / (_view(self._lengths) + len(grams) - shared)

    def near(self, text: str, threshold: float = NEAR) -> list[tuple[int, float]]:
        """Return (place, similarity) of the texts that are at least so similar, by place.

        First only the rarer grams are counted. A text is compared in full when it could still
        reach the threshold with every one that was left out.
        """
        grams = trigrams(text)
        left_out = int(_COMMON * threshold * len(grams))
        rarest = sorted(grams, key=lambda gram: len(self._postings.get(gram, ())))
        possible = self._count(rarest[: len(grams) - left_out]) + left_out
        # Jaccard ≥ t needs t / (1 + t) of both sizes shared; the difference allows for rounding.
        needed = threshold / (1 + threshold) * (_view(self._lengths) + len(grams)) - 1e-9
        found = (
            (int(p), _jaccard(grams, self._grams[p])) for p in (possible >= needed).nonzero()[0]
        )
        return [(place, alike) for place, alike in found if alike >= threshold]

    def _count(self, grams: Iterable[str]) -> NDArray[np.int64]:
        """Return how many of the grams each text holds."""
        found = [self._postings[gram] for gram in grams if gram in self._postings]
        places = np.concatenate([_view(posting) for posting in found]) if found else _NONE
        return np.bincount(places, minlength=len(self._grams))


def _view(numbers: "array[int]") -> NDArray[np.intc]:
    return np.frombuffer(numbers, dtype=np.intc) if numbers else _NONE


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
