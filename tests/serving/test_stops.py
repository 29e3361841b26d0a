import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serving.stops import StopMatcher

letters = st.text(alphabet="ab<é", max_size=40)
stop_strings = st.lists(st.text(alphabet="ab<é", min_size=1, max_size=5), max_size=5)


def cut_by_brute_force(text: str, stops: list[str]) -> tuple[str, bool]:
    """The stop string that is complete first wins; of several, the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(letters, stop_strings, st.lists(st.integers(0, 40), max_size=10))
def test_text_is_cut_where_brute_force_cuts_it_however_it_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces_of(text, cuts):
        shown += matcher.push(piece)
        if matcher.stopped:
            break
    else:
        shown += matcher.finish()
    assert (shown, matcher.stopped) == cut_by_brute_force(text, stops)


@given(letters, stop_strings)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.push(character)
        if matcher.stopped:
            return
        held = text[len(shown) : end]
        begins = [
            p for s in stops for p in (s[:n] for n in range(1, len(s))) if text[:end].endswith(p)
        ]
        assert held == max(begins, key=len, default="")


def test_a_stop_string_that_almost_comes_again_and_again_costs_linear_time() -> None:
    stops = ["a" * 255 + "b", "a" * 200 + "c"]

    def seconds(length: int) -> float:
        matcher = StopMatcher(stops)
        began = time.process_time()
        for _ in range(length // 4):
            matcher.push("aaaa")
        return time.process_time() - began

    seconds(1000)
    small, large = seconds(10_000), seconds(80_000)
    assert large < 24 * small + 0.05
