"""A call as Python writes it, read while it is written."""

import ast
import json
import re
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, cast

from serving.call_text import TextCall
from serving.parameters import Arguments

MAX_KEY = 256  # characters
_MAX_LITERAL = 65_536  # characters
_CALL = re.compile(r"([a-zA-Z0-9_-]{1,64})[ \t]*\(")
_MAY_BECOME_CALL = re.compile(r"[a-zA-Z0-9_-]{0,64}[ \t]{0,64}")
_KEY_CHARACTERS = r"""[^=,()\[\]{}"'#]"""
_KEY = re.compile(rf"({_KEY_CHARACTERS}{{1,{MAX_KEY}}})=(?!=)")
_MAY_BECOME_KEY = re.compile(rf"{_KEY_CHARACTERS}{{0,{MAX_KEY}}}=?")
_BETWEEN = re.compile(r"(?:[\s,]|#[^\n]*\n)*")  # arguments: comments, too
_COMMENT = re.compile(r"#[^\n]*")
# Where a string begins: its prefix and its quotes.
_STRING = re.compile(r"""([rRbBuUfF]{0,2})(\"{3}|'{3}|["'])""")
_MAY_BECOME_STRING = re.compile(r"""[rRbBuUfF]{0,2}(?:"{1,2}|'{1,2})?""")
_JOINED = re.compile(r"(?:[\s+]|\\\n)+")  # between strings that are one
_PLAIN = {quote: re.compile(rf"[^\\{quote}]+") for quote in "\"'"}
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL
)
_MAY_BECOME_ESCAPE = re.compile(
    r"\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?|U[0-9a-fA-F]{0,7}|[0-7]{0,2})?"
)
_SAME_ESCAPES = '"\\/bfnrt'  # in JSON
_OTHER_ESCAPES = {"'": "'", "\n": "", "a": "\\u0007", "v": "\\u000b"}
_OUTSIDE = re.compile(r"""[^"'()\[\]{},]+""")
_CONSTANTS = {"true": True, "false": False, "null": None}  # of JSON


class PythonCall(TextCall):
    """`name(key="text", other=[1, None])`.

    A string is told while it is written, any other value at its end. A value without a name is that
    of the first argument in the tool's schema that has none yet.
    """

    def __init__(self, arguments_of: Callable[[str], Arguments]) -> None:
        """`arguments_of`: the arguments of a tool, by its name."""
        super().__init__(arguments_of)
        self._value: _Value | None = None  # that is read now

    def _read_on(self, text: str, at: int) -> int:
        if self.name is None:
            return self._read_name(text, at)
        return self._read_key(text, at) if self._value is None else self._read_value(text, at)

    def cut(self, rest: str) -> None:
        """Take what was held back of a value: the output ends within it."""
        if self._value is not None:
            self._say(self._value.cut(rest))

    def _read_name(self, text: str, at: int) -> int:
        if found := _CALL.match(text, at):
            self.name = found[1]
            return found.end()
        self.over = _MAY_BECOME_CALL.fullmatch(text, at) is None
        return at

    def _read_key(self, text: str, at: int) -> int:
        between = _BETWEEN.match(text, at)
        at = between.end() if between else at
        if at == len(text) or _COMMENT.fullmatch(text, at):
            return at
        if text[at] == ")":
            return self._end(at)
        if _MAY_BECOME_KEY.fullmatch(text, at):
            return at
        found = _KEY.match(text, at)
        self._value = _Value()
        self._begin_argument(found[1].strip() if found else self._next_name())
        return found.end() if found else self._read_value(text, at)

    def _next_name(self) -> str:
        names = self._arguments_of(str(self.name)).names
        return next((n for n in names if n not in self._known), str(len(self._known)))

    def _read_value(self, text: str, at: int) -> int:
        value = self._value or _Value()
        at = value.read(text, at)
        self._say(value.take())
        if not value.over:
            return at
        self._value = None
        self._end_argument()
        return at + 1 if text[at] == "," else self._end(at)

    def _end(self, at: int) -> int:
        self._end_call()
        return at + 1


class _Value:
    """One value of Python or JSON, written as JSON: what is neither is a string.

    Strings beside each other are one, as in Python.
    """

    def __init__(self) -> None:
        self.over = False  # at the comma or parenthesis behind it
        self._is_string: bool | None = None  # None: it has not begun
        self._quotes = ""  # of the string that is read now
        self._raw = False  # a backslash in it is one
        self._in_comment = False
        self._depth = 0  # of brackets that are open in what is no string
        self._inner = ""  # quotes of the string in there
        self._text: list[str] = []  # of what is no string, or stands behind one
        self._json: list[str] = []  # not taken yet

    def read(self, text: str, at: int) -> int:
        """Read up to what stands behind the value, or to what needs more text."""
        while at < len(text) and not self.over:
            after = self._read(text, at)
            if after == at:
                break
            at = after
        return at

    def take(self) -> str:
        """Return the JSON text that was not taken yet."""
        taken = "".join(self._json)
        self._json = []
        return taken

    def cut(self, rest: str) -> str:
        """Return what was held back, as it was written; `rest` was not read."""
        if self._is_string:
            return _inside("".join(self._text))
        return "".join((*self._text, rest)).lstrip()

    def _read(self, text: str, at: int) -> int:
        if self._quotes:
            return self._read_string(text, at)
        if self._in_comment:
            end = text.find("\n", at)
            self._in_comment = end < 0
            return len(text) if end < 0 else end
        if self._inner or self._depth:
            return self._read_other(text, at)
        if text[at] in ",)":
            self._end()
            return at
        if self._is_string is None:
            return at + 1 if text[at].isspace() else self._begin(text, at)
        if not self._is_string or self._text:
            return self._read_other(text, at)
        return self._read_behind(text, at)

    def _begin(self, text: str, at: int) -> int:
        if _MAY_BECOME_STRING.fullmatch(text, at):
            return at
        found = _STRING.match(text, at)
        self._is_string = found is not None
        if found is None:
            return self._read_other(text, at)
        self._json.append('"')
        return self._open(found)

    def _open(self, found: re.Match[str]) -> int:
        self._raw, self._quotes = "r" in found[1].lower(), found[2]
        return found.end()

    def _read_string(self, text: str, at: int) -> int:
        quotes = self._quotes
        if found := _PLAIN[quotes[0]].match(text, at):
            self._json.append(_inside(found[0]))
            return found.end()
        if text.startswith(quotes, at):
            self._quotes = ""
            return at + len(quotes)
        if text[at] == quotes[0]:
            if _ends_with(text, at, text[at]) or _ends_with(text, at, 2 * text[at]):
                return at
            self._json.append(_inside(text[at]))
            return at + 1
        if self._raw:
            self._json.append(_inside(text[at : at + 2]) if at + 1 < len(text) else "")
            return at + 2 if at + 1 < len(text) else at
        if _MAY_BECOME_ESCAPE.fullmatch(text, at) or not (found := _ESCAPE.match(text, at)):
            return at
        self._json.append(_escaped(found))
        return found.end()

    def _read_behind(self, text: str, at: int) -> int:
        """Read what stands behind a string: more of it, a comment, or what makes no sense."""
        if found := _JOINED.match(text, at):
            return found.end()
        if text[at] == "#":
            self._in_comment = True
            return at + 1
        if _ends_with(text, at, "\\") or _MAY_BECOME_STRING.fullmatch(text, at):
            return at
        found = _STRING.match(text, at)
        return self._open(found) if found else self._read_other(text, at)

    def _read_other(self, text: str, at: int) -> int:
        """Read what is no string: up to the next quote, bracket or comma."""
        mark, end = text[at], at + 1
        if self._inner:
            found = _PLAIN[self._inner[0]].match(text, at)
            if found:
                end = found.end()
            elif mark == "\\":
                end = at + 2
            elif text.startswith(self._inner, at):
                end = at + len(self._inner)
                self._inner = ""
            elif len(text) - at < len(self._inner):
                return at
            if end > len(text):
                return at
        elif mark in _PLAIN and (self._depth or not self._text):
            if _ends_with(text, at, mark) or _ends_with(text, at, 2 * mark):
                return at
            self._inner = 3 * mark if text.startswith(3 * mark, at) else mark
            end = at + len(self._inner)
        elif mark in "([{":
            self._depth += 1
        elif mark in ")]}":
            self._depth = max(0, self._depth - 1)
        elif found := _OUTSIDE.match(text, at):
            end = found.end()
        self._text.append(text[at:end])
        return end

    def _end(self) -> None:
        self.over = True
        text = "".join(self._text).strip()
        if self._is_string:
            self._json.append(f'{_inside(text)}"')
        else:
            self._json.append("null" if self._is_string is None else _literal(text))


class _Constants(ast.NodeTransformer):
    """Puts Python's constants in the place of JSON's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        known = node.id in _CONSTANTS
        return ast.copy_location(ast.Constant(_CONSTANTS[node.id]), node) if known else node


def _escaped(found: re.Match[str]) -> str:
    """Return in a JSON string what an escape in a string stands for."""
    short, byte, long, octal, mark = found.groups()
    if short or byte:
        return f"\\u{short or f'00{byte}'}"
    if long or octal:
        point = int(long, 16) if long else int(octal, 8)
        # Half of a character cannot be sent to anybody.
        whole = point < 0x110000 and not 0xD800 <= point < 0xE000
        return _inside(chr(point) if whole else found[0])
    if mark in _SAME_ESCAPES:
        return found[0]
    return _OTHER_ESCAPES.get(mark, _inside(found[0]))


def _ends_with(text: str, at: int, what: str) -> bool:
    return len(text) - at == len(what) and text.startswith(what, at)


def _inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _literal(text: str) -> str:
    """Return the JSON text of a literal of JSON or Python, and of anything else as a string."""
    if len(text) <= _MAX_LITERAL:
        try:
            # Python turns no integer of 5,000 digits into one, and which it is does not matter.
            json.loads(text, parse_int=len, parse_constant=_no_constant)
            return text
        except (ValueError, RecursionError):
            pass
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes that it does not know
                tree = ast.parse(text, mode="eval")
            found = ast.literal_eval(_Constants().visit(tree))
            return json.dumps(found, allow_nan=False, default=_listed)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, set):
        return [*cast("set[Any]", value)]
    raise TypeError(f"JSON has no {type(value).__name__}")


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")
