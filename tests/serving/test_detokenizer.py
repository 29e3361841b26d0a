import time

from hypothesis import example, given
from hypothesis import strategies as st

from serving.detokenizer import Detokenizer
from serving.tokens import Tokens


def text_of(tokens: Tokens, ids: list[int]) -> str:
    detokenizer = tokens.detokenizer()
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


@given(text=st.text(max_size=60))
def test_text_comes_back_whole_and_no_piece_breaks_a_character(tokens: Tokens, text: str) -> None:
    detokenizer = tokens.detokenizer()
    ids = list(text.encode("utf-8", errors="ignore"))
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.finish() == tokens.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 127), max_size=60), control=st.sampled_from([256, 257]))
def test_control_tokens_leave_no_trace(tokens: Tokens, ids: list[int], control: int) -> None:
    mixed = [token for pair in zip(ids, [control] * len(ids), strict=True) for token in pair]
    assert text_of(tokens, mixed) == bytes(ids).decode()


@given(ids=st.lists(st.integers(0, 255), max_size=60))
@example(ids=[128, 128, 128, 194, *[128] * 8])  # the fourth is given up, and could go on
def test_bytes_that_are_no_text_come_out_as_replacement_characters(
    tokens: Tokens, ids: list[int]
) -> None:
    """Not in the same number as one decode of everything, but never lost and never late."""
    detokenizer = tokens.detokenizer()
    silent = 0
    for token_id in ids:
        silent = 0 if detokenizer.push(token_id) else silent + 1
        assert silent < 4
    ascii_shown = [c for c in text_of(tokens, ids) if c < "\x80"]
    assert ascii_shown == [chr(i) for i in ids if i < 0x80]


def test_a_sentencepiece_tokenizer_keeps_its_spaces() -> None:
    """Such a tokenizer drops the space before the first token of whatever it decodes."""
    words = ["▁Hello", "▁", "▁world", "s"]

    def decode(ids: object) -> str:
        text = "".join(words[i] for i in ids).replace("▁", " ")  # type: ignore[attr-defined]
        return text.removeprefix(" ")

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(i) for i in (0, 2, 3, 1, 0)]
    assert "".join(pieces) == "Hello worlds  Hello"


def test_long_answers_cost_linear_time(tokens: Tokens) -> None:
    def seconds(length: int) -> float:
        detokenizer = tokens.detokenizer()
        began = time.process_time()
        for _ in range(length):
            detokenizer.push(0xFF)  # the worst case: never a whole character
        return time.process_time() - began

    seconds(1000)
    small, large = seconds(5_000), seconds(40_000)
    assert large < 24 * small + 0.05
