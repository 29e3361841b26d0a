"""Near duplicates against the definition written out: every pair, sets, no index."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.duplicates import (
    GramIndex,
    Pair,
    near_across,
    near_pairs,
    nearest,
    normalise,
    similarity,
)

# Few letters, so that grams are shared often and the threshold is met from both sides.
TEXTS = st.lists(st.text(alphabet="abC \n", max_size=14), max_size=12)


def jaccard(a: str, b: str) -> float:
    def grams(text: str) -> set[str]:
        text = " ".join(text.lower().split())
        return {text[i : i + 3] for i in range(len(text) - 2)} or {text}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def test_known_similarities() -> None:
    assert similarity("abcd", "abcd") == 1.0
    assert similarity("abcd", "ABCD ") == 1.0
    assert similarity("abcd", "abce") == pytest.approx(1 / 3)  # abc | bcd, bce
    assert similarity("abc", "xyz") == 0.0
    assert similarity("no", "no") == 1.0
    assert similarity("", "abc") == 0.0
    assert similarity("turn on the lamp", "turn on the red lamp") == pytest.approx(13 / 19)


def test_case_and_spacing_make_no_difference() -> None:
    assert normalise("  Where\tIS\n my card? ") == "where is my card?"


@given(TEXTS, st.sampled_from([0.3, 0.5, 0.6, 1.0]))
@settings(max_examples=200, deadline=None)
def test_pairs_of_one_list_are_those_of_the_definition(texts: list[str], threshold: float) -> None:
    expected = [
        Pair(i, j, jaccard(texts[i], texts[j]))
        for i, j in combinations(range(len(texts)), 2)
        if jaccard(texts[i], texts[j]) >= threshold
    ]
    assert near_pairs(texts, threshold) == expected


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_pairs_of_two_lists_and_the_nearest_are_those_of_the_definition(
    texts: list[str], others: list[str]
) -> None:
    all_pairs = [
        Pair(i, j, jaccard(texts[i], others[j]))
        for i, j in product(range(len(texts)), range(len(others)))
    ]
    assert near_across(texts, others) == [pair for pair in all_pairs if pair.similarity >= 0.6]
    best = [max((p.similarity for p in all_pairs if p.first == i), default=0.0) for i in range(99)]
    assert nearest(texts, others) == best[: len(texts)]


def test_an_index_finds_what_was_added_later() -> None:
    index = GramIndex(["where is my card?"])
    assert index.near("where is my new card?") == [(0, pytest.approx(14 / 20))]
    index.add("Where is my new card?")
    assert [place for place, _ in index.near("where is my new card?")] == [0, 1]
    assert index.near("what is the exchange rate?") == []


def test_how_far_a_comparison_is_gets_told() -> None:
    told: list[int] = []
    near_pairs(["a", "b", "c"], done=told.append)
    near_across(["a", "b"], ["c"], done=told.append)
    assert told == [1, 2, 3, 1, 2]
