"""A call as Python writes it, read while it is written."""

import json
import re
from collections.abc import Callable, Sequence

_SPACE = " \t\r\n"
_MAX_KEY = 256  # characters
_CALL = re.compile(r"([a-zA-Z0-9_-]{1,64})\(")
_MAY_BECOME_CALL = re.compile(r"[a-zA-Z0-9_-]{0,64}")
_KEY = re.compile(rf"""([^=,()\[\]{{}}"']{{1,{_MAX_KEY}}})=""")
_MAY_BECOME_KEY = re.compile(rf"""[^=,()\[\]{{}}"']{{0,{_MAX_KEY}}}""")
_WORD = re.compile(r"""[^,:()\[\]{}"']+""")
_PLAIN = {quote: re.compile(rf"[^\\{quote}]+") for quote in "\"'"}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_MAY_BECOME_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?|U[0-9a-fA-F]{0,7})?")
_SAME_ESCAPES = '"\\/bfnrt'  # in JSON
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_BRACKETS = {"(": "[]", "[": "[]", "{": "{}"}


class PythonCall:
    """`name(key="text", other=[1, None])`.

    A value without a name is that of the argument which the tool's schema has at its place.
    """

    def __init__(self, names_of: Callable[[str], Sequence[str]]) -> None:
        """`names_of`: the names of a tool's arguments, by its own."""
        self._names_of = names_of
        self.name: str | None = None
        self.begun = False  # it is known to be a call
        self.over = False  # at its end, or not what it should be
        self._place = 0  # of the argument that is read now
        self._key = ""  # of that argument
        self._known: set[str] = set()  # keys that were given: of two values the first one counts
        self._value: _Value | None = None
        self._arguments: list[str] = []  # not taken yet

    def read(self, text: str) -> int:
        """Read up to the tool's name, the call's end, or what needs more text.

        Return how many characters that were.
        """
        if self.name is None:
            return self._read_name(text)
        at = 0
        while not self.over:
            after = self._read_key(text, at) if self._value is None else self._read_value(text, at)
            if after == at:
                break
            at = after
        return at

    def take(self) -> str:
        """Return the arguments' text that was not taken yet."""
        taken = "".join(self._arguments)
        self._arguments = []
        return taken

    def _read_name(self, text: str) -> int:
        if found := _CALL.match(text):
            self.name = found[1]
            return found.end()
        self.over = _MAY_BECOME_CALL.fullmatch(text) is None
        return 0

    def _read_key(self, text: str, at: int) -> int:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        if at == len(text):
            return at
        if text[at] == ")":
            return self._end(at)
        found = _KEY.match(text, at)
        if found is None and _MAY_BECOME_KEY.fullmatch(text, at):
            return at
        names = () if found else self._names_of(str(self.name))
        named = names[self._place] if self._place < len(names) else str(self._place)
        self._key = found[1].strip() if found else named
        self._value = _Value()
        self._say(f"{', ' if self._known else '{'}{json.dumps(self._key)}: ")
        return found.end() if found else self._read_value(text, at)

    def _read_value(self, text: str, at: int) -> int:
        value = self._value or _Value()
        at = value.read(text, at)
        self._say(value.take())
        if not value.over:
            return at
        self._known.add(self._key)
        self._place += 1
        self._value = None
        return at + 1 if text[at] == "," else self._end(at)

    def _end(self, at: int) -> int:
        self.over = True
        self._arguments.append("}" if self._known else "{}")
        return at + 1

    def _say(self, text: str) -> None:
        if self._key not in self._known:
            self._arguments.append(text)


class _Value:
    """One value of Python or JSON, written as JSON while it is read.

    What is neither is a string. Strings beside each other are one, as in Python. A bracket that
    does not match closes the last one that is open.
    """

    def __init__(self) -> None:
        self.over = False  # what comes next ends it
        self._closings: list[str] = []  # of the brackets that are open
        self._quote = ""  # of the string that is read now
        self._in_string = False  # its end is not written yet: another one may follow
        self._word: list[str] = []
        self._comma = False  # stands before what comes next
        self._empty = True
        self._json: list[str] = []  # not taken yet

    def read(self, text: str, at: int) -> int:
        """Read up to the comma or parenthesis behind the value, or to what needs more text."""
        while at < len(text) and not self.over:
            after = self._read_string(text, at) if self._quote else self._read_outside(text, at)
            if after == at:
                break
            at = after
        return at

    def take(self) -> str:
        """Return the JSON text that was not taken yet."""
        taken = "".join(self._json)
        self._json = []
        return taken

    def _read_string(self, text: str, at: int) -> int:
        if found := _PLAIN[self._quote].match(text, at):
            self._json.append(_inside(found[0]))
            return found.end()
        if text[at] == self._quote:
            self._quote = ""
            return at + 1
        if _MAY_BECOME_ESCAPE.fullmatch(text, at) or not (found := _ESCAPE.match(text, at)):
            return at
        self._json.append(_escaped(found))
        return found.end()

    def _read_outside(self, text: str, at: int) -> int:
        mark = text[at]
        if mark in _PLAIN:
            self._begin_string(mark)
        elif mark in _BRACKETS:
            self._end_piece()
            opening, closing = _BRACKETS[mark]
            self._begin(opening)
            self._closings.append(closing)
        elif mark in ",)" and not self._closings:
            self._end_piece()
            self._json.append("null" if self._empty else "")
            self.over = True
            return at
        elif mark == ",":
            self._end_piece()
            self._comma = True
        elif mark in ")]}" and self._closings:
            self._end_piece()
            self._comma = False  # one may stand behind the last value in Python
            self._json.append(self._closings.pop())
        elif mark == ":" and self._closings:
            self._end_piece(is_key=True)
            self._json.append(": ")
        else:
            found = _WORD.match(text, at)
            self._word.append(found[0] if found else mark)
            return found.end() if found else at + 1
        return at + 1

    def _begin_string(self, quote: str) -> None:
        if any(not piece.isspace() for piece in self._word):
            self._end_piece()
        self._word = []
        if not self._in_string:
            self._begin('"')
        self._quote, self._in_string = quote, True

    def _begin(self, text: str) -> None:
        self._json.append(f", {text}" if self._comma else text)
        self._comma = self._empty = False

    def _end_piece(self, *, is_key: bool = False) -> None:
        """Write the end of a string, and a word that came behind it or alone."""
        if self._in_string:
            self._json.append('"')
            self._in_string = False
        if word := "".join(self._word).strip():
            self._begin(json.dumps(word, ensure_ascii=False) if is_key else _literal(word))
        self._word = []


def _escaped(found: re.Match[str]) -> str:
    """Return in a JSON string what an escape in a string stands for."""
    short, byte, long, mark = found.groups()
    if short or byte:
        return f"\\u{short or f'00{byte}'}"
    if long:
        point = int(long, 16)
        # Half of a character cannot be sent to anybody.
        whole = point < 0x110000 and not 0xD800 <= point < 0xE000
        return _inside(chr(point) if whole else found[0])
    if mark in _SAME_ESCAPES:
        return found[0]
    return {"'": "'", "\n": ""}.get(mark, _inside(found[0]))


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _literal(word: str) -> str:
    """Return the JSON text of a word: a constant, a number, or else a string."""
    word = _CONSTANTS.get(word, word)
    if word in _CONSTANTS.values() or _NUMBER.fullmatch(word):
        return word
    return json.dumps(word, ensure_ascii=False)
