"""Token ids to text while they come, in linear time and without a broken character."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

# A character is at most four bytes, and a token is at least one of them. Whoever has more tokens
# pending than that holds bytes that will never become a character.
_MAX_PENDING = 4

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Turns the tokens of one sequence into pieces of text.

    Tokens cannot be decoded one by one: a character may span several, and some tokenizers drop
    the space before the first token they see. So the last tokens that gave text are decoded
    again in front of the new ones, and only what the new ones add is handed out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._settled: list[int] = []  # tokens whose text was handed out last
        self._settled_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        text = self._text()
        if text.endswith(REPLACEMENT):
            if len(self._pending) < _MAX_PENDING:
                return ""
            self._pending = []  # given up; as context it would take what comes for its end
            return text
        if not text and self._settled:
            self._pending = []  # a control token: nothing to show, nothing to remember
            return ""
        self._settled, self._pending = self._pending, []
        self._settled_text = self._decode(self._settled)
        return text

    def finish(self) -> str:
        """Return what is left: an unfinished character reads as U+FFFD."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text

    def _text(self) -> str:
        return self._decode(self._settled + self._pending)[len(self._settled_text) :]
