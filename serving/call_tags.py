"""A call whose arguments stand between tags, read while it is written."""

import json
import re
from collections.abc import Callable

from serving.call_text import TextCall
from serving.parameters import STRING, Arguments, as_json

FUNCTION, PARAMETER, END = "<function=", "<parameter=", "</function>"
END_OF_VALUE = "</parameter>"
_SPACE = " \t\r\n"
_MAX_NAME = 256  # characters
_TAG = re.compile(
    rf"{FUNCTION}([a-zA-Z0-9_-]{{1,64}})>|{PARAMETER}([^<>\n]{{1,{_MAX_NAME}}})>|{END}"
)


class TaggedCall(TextCall):
    """`<function=name>`, `<parameter=key>value</parameter>` for each argument, `</function>`."""

    def __init__(self, padding: str, arguments_of: Callable[[str], Arguments]) -> None:
        """`padding`: what stands before and after each value; `arguments_of`: by a tool's name."""
        super().__init__(arguments_of)
        self._padding = padding
        self._schema = Arguments({})
        self._types = STRING
        self._fresh = False  # nothing of its value was read
        self._value: list[str] = []  # of what is no string, in pieces

    def _read_on(self, text: str, at: int) -> int:
        return self._read_tag(text, at) if self._key is None else self._read_value(text, at)

    def cut(self, rest: str) -> None:
        """Take what was held back of a value: the output ends within it."""
        if self._key is not None:
            self._keep(rest)
            self._say("".join(self._value))

    def _read_tag(self, text: str, at: int) -> int:
        while at < len(text) and text[at] in _SPACE:
            at += 1
        found = _TAG.match(text, at)
        if found is None:
            self.over = not _may_become_tag(text[at : at + len(PARAMETER) + _MAX_NAME + 1])
        elif (found[1] is None) == (self.name is None):  # a second name, or none before all else
            self.over, found = True, None
        elif found[1] is not None:
            self.name = str(found[1])
            self._schema = self._arguments_of(self.name)
        elif found[2] is not None:
            self._begin_value(found[2])
        else:
            self.over = True
        if self.over and self.name is None:
            return at + 1  # this one begins no call
        if self.over:
            self._end_call()
        return found.end() if found else at

    def _begin_value(self, key: str) -> None:
        self._fresh, self._types = True, self._schema.types(key)
        self._begin_argument(key)
        self._say('"' if self._types == STRING else "")

    def _read_value(self, text: str, at: int) -> int:
        if self._fresh:
            if at == len(text):
                return at
            self._fresh = False
            at += len(self._padding) if text.startswith(self._padding, at) else 0
        end = text.find(END_OF_VALUE, at)
        if end >= 0:
            self._keep(text[at:end].removesuffix(self._padding))
            self._end_value()
            return end + len(END_OF_VALUE)
        rest = text[at:]
        kept = max(overlap(rest, self._padding + END_OF_VALUE), overlap(rest, END_OF_VALUE))
        self._keep(rest[: len(rest) - kept])
        return len(text) - kept

    def _keep(self, value: str) -> None:
        """Strings are handed on as they come; what all else is shows at its end."""
        if self._types == STRING:
            self._say(json.dumps(value, ensure_ascii=False)[1:-1])
        else:
            self._value.append(value)

    def _end_value(self) -> None:
        self._say('"' if self._types == STRING else as_json("".join(self._value), self._types))
        self._value = []
        self._end_argument()


def _may_become_tag(text: str) -> bool:
    for tag in (FUNCTION, PARAMETER, END):
        if tag.startswith(text):
            return True
        if text.startswith(tag) and tag != END:
            name = text[len(tag) :]
            return len(name) <= _MAX_NAME and not any(each in name for each in "<>\n")
    return False


def overlap(text: str, opening: str) -> int:
    """Return the length of the longest end of `text` that `opening` begins with."""
    longest = min(len(text), len(opening) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(opening[:n])), 0)
