"""Calls of tools in what a model writes, found while it is written.

A family of models writes a call as a JSON object with the tool's name and its arguments, as the
name and then an object of arguments, with each argument between tags (`call_tags`), or as Python
writes one (`call_python`). Where they stand differs. Every character is read a bounded number of
times, whatever the model writes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serving.call_python import PythonCall
from serving.call_tags import FUNCTION, TaggedCall, overlap
from serving.parameters import Arguments, Schema

_SPACE = " \t\r\n"
_CALL_ID, _ARGS = "[CALL_ID]", "[ARGS]"
_HEAD_PIECES = re.compile(r"(?:[a-zA-Z0-9_\- \t\r\n]|\[CALL_ID\]|\[ARGS\])*")
_HEAD = re.compile(r"\s*([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9_-]{1,64})?\[ARGS\]\s*")
_MAX_HEAD = 256  # characters
_PORTION = 512  # characters: what is left of a portion is copied at each call in it


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family of models writes calls."""

    name: Literal[
        "hermes", "mistral", "mistral_args", "llama", "granite", "cohere", "tags", "seed", "olmo"
    ]
    opening: str  # what stands before calls
    closing: str  # what stands after each call, or after a list of them; empty: nothing
    arguments: str = "arguments"  # the key of the arguments
    tool: str = "name"  # the key of the tool's name
    bare: bool = False  # an answer that begins with an object is a call without `opening`, too
    listed: bool = False  # the objects are in a JSON list
    numbered: str = ""  # the key of a number that each object begins with
    marks: tuple[str, ...] = ()  # between the tool's name, which is in no object, and its arguments
    tagged: bool = False  # each argument is between tags, and no object there
    padding: str = ""  # what stands before and after the value of such an argument
    python: bool = False  # calls are those of Python, one behind the other before `closing`

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that are not part of a text but must be seen to find the calls."""
        return (self.opening, *self.marks, self.closing)


HERMES = CallFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", "", listed=True)
MISTRAL_ARGS = CallFormat("mistral_args", "[TOOL_CALLS]", "", marks=(_CALL_ID, _ARGS))
LLAMA = CallFormat("llama", "<|python_tag|>", "", "parameters", bare=True)
GRANITE = CallFormat("granite", "<|tool_call|>", "", listed=True)
COHERE = CallFormat(
    *("cohere", "<|START_ACTION|>", "<|END_ACTION|>", "parameters", "tool_name"),
    listed=True,
    numbered="tool_call_id",
)
TAGS = CallFormat("tags", "<tool_call>", "</tool_call>", tagged=True, padding="\n")
SEED = CallFormat("seed", "<seed:tool_call>", "</seed:tool_call>", tagged=True)
OLMO = CallFormat("olmo", "<function_calls>", "</function_calls>", python=True)
FORMATS = (HERMES, MISTRAL, MISTRAL_ARGS, LLAMA, GRANITE, COHERE, TAGS, SEED, OLMO)


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A call that begins, with its tool's name, or more of the arguments of call `index`."""

    index: int
    name: str
    arguments: str


Event = str | CallDelta  # a string is text of the answer beside the calls


class CallParser:
    """Divides one output, pushed in pieces, into text and calls.

    What looks like a call and is none, because it is not JSON or names no tool, is text.
    """

    def __init__(self, form: CallFormat, tools: Mapping[str, Schema]) -> None:
        """`tools`: the schema of each tool's arguments, by its name."""
        self._form, self._tools = form, dict(tools)
        self._arguments: dict[str, Arguments] = {}  # of tools that were called
        self.calls = 0
        self._text = ""  # not read yet
        # Lists of pieces: a model that writes spaces for ever costs no more than one that does not.
        self._held: list[str] = []  # read, and text unless a call comes of it
        self._spaces: list[str] = []  # read; dropped where a call follows, or the end after one
        self._among_calls = False
        self._called = False  # since the last opening
        self._at_end = False  # of a list of calls, which a mark still closes
        self._at_start = True
        self._object: _Call | None = None
        self._events: list[Event] = []

    def push(self, text: str) -> list[Event]:
        """Return what this text adds. Text that may become a call is held back."""
        for start in range(0, len(text), _PORTION):
            self._text += text[start : start + _PORTION]
            while self._text and self._read():
                pass
        return self._take()

    def finish(self) -> list[Event]:
        """Return what was held back: no more text comes."""
        if self._object is None or not self._object.begun:
            self._release()
            self._say(self._text)
        elif isinstance(self._object, TaggedCall | PythonCall):
            self._object.cut(self._text)
            if arguments := self._object.take():
                self._events.append(CallDelta(self.calls - 1, "", arguments))
        self._text = ""
        if not self.calls and (spaces := "".join(self._spaces)):
            self._events.append(spaces)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _read(self) -> bool:
        """Read on; False: nothing can be said without more text."""
        if self._object is not None:
            return self._read_object(self._object)
        return self._read_between() if self._among_calls else self._read_text()

    def _read_text(self) -> bool:
        if self._at_start and self._form.bare:
            self._skip(_SPACE)
            if not self._text:
                return False
            if self._text[0] == "{":
                self._begin_object()
                return True
            self._release()
        self._at_start = False
        opening = self._form.opening
        before, found, after = self._text.partition(opening)
        if self._form.tagged and FUNCTION in before:
            # Qwen 3 Coder forgets the opening now and then: a call, where there is such a tool.
            self._say(before[: before.index(FUNCTION)])
            self._text = self._text[before.index(FUNCTION) :]
            self._begin_object()
            return True
        if found:
            self._say(before)
            self._held, self._text = [found], after
            self._among_calls, self._called, self._at_end = True, False, False
            return True
        kept = max(overlap(self._text, mark) for mark in (opening, FUNCTION * self._form.tagged))
        self._say(self._text[: len(self._text) - kept])
        self._text = self._text[len(self._text) - kept :]
        return False

    def _read_between(self) -> bool:
        """Read from one call to the next, or to the end of the calls."""
        form = self._form
        between = "[," if form.listed else ",;" if form.python else ";" * form.bare
        self._skip(_SPACE + ("" if self._at_end else between))
        text = self._text
        if form.listed and self._called and not self._at_end and text.startswith("]"):
            self._held, self._text = [], text[1:]
            self._among_calls = self._at_end = bool(form.closing)
            return True
        begins = FUNCTION if form.tagged else form.closing if self._at_end else "{"
        if not text or any(
            text != mark and mark.startswith(text) for mark in (begins, form.closing)
        ):
            return False
        if form.python:  # it begins with a tool's name, whatever that is
            found = not text.startswith(form.closing)
        else:
            found = not self._called if form.marks else text.startswith(begins)
        if found and not self._at_end:
            self._begin_object()
            return True
        if form.closing and text.startswith(form.closing) and self._called:
            self._held, self._text = [], text[len(form.closing) :]
        self._release()
        self._among_calls = False
        return True

    def _skip(self, characters: str) -> None:
        rest = self._text.lstrip(characters)
        self._held.append(self._text[: len(self._text) - len(rest)])
        self._text = rest

    def _begin_object(self) -> None:
        self._at_start = False
        if self._form.tagged:
            self._object = TaggedCall(self._form.padding, self._arguments_of)
        elif self._form.python:
            self._object = PythonCall(self._arguments_of)
        else:
            made = _NamedCall if self._form.marks else _CallObject
            self._object = made(self._form)

    def _arguments_of(self, tool: str) -> Arguments:
        if tool not in self._arguments:
            self._arguments[tool] = Arguments(self._tools.get(tool, {}))
        return self._arguments[tool]

    def _read_object(self, found: "_Call") -> bool:
        read = found.read(self._text)
        self._held.append(self._text[:read])
        self._text = self._text[read:]
        if found.name is not None and not found.begun:
            self._begin_call(found, found.name)
        if found.begun:
            self._held = []
            if arguments := found.take():
                self._events.append(CallDelta(self.calls - 1, "", arguments))
        if not found.over:
            return read > 0 and self._text != ""
        if not found.begun:
            self._release()
        self._among_calls = found.begun
        self._object = None
        return True

    def _begin_call(self, found: "_Call", name: str) -> None:
        # Behind an opening a call of something unknown is still one; a bare object may be data.
        if not self._among_calls and name not in self._tools:
            found.over = True
            return
        found.begun = self._called = True
        self._spaces = []
        self._events.append(CallDelta(self.calls, name, ""))
        self.calls += 1

    def _release(self) -> None:
        """Nothing came of what was held: it is text."""
        self._say("".join(self._held))
        self._held = []

    def _say(self, text: str) -> None:
        said = text.rstrip(_SPACE)
        if said:
            self._events.append("".join(self._spaces) + said)
            self._spaces = []
        self._spaces.append(text[len(said) :])


class _CallObject:
    """One JSON object, read character by character: the tool's name, and the arguments as text."""

    def __init__(self, form: CallFormat) -> None:
        self._name_key = form.tool
        self._argument_keys = (form.arguments, "arguments", "parameters")
        self.name: str | None = None
        self.begun = False  # it is known to be a call
        self.over = False  # at its end, or not what it should be
        self._depth = self._outside = 0  # the object is over where it is `_outside` again
        self._in_string = self._escaped = False
        self._key: str | None = None
        self._piece: list[str] = []  # of the key or value that is read now
        self._arguments: list[str] = []  # not taken yet
        self._given = False  # there were arguments

    def read(self, text: str) -> int:
        """Read up to the tool's name or the object's end; return how many characters that were."""
        named = self.name is not None
        for index, character in enumerate(text):
            if self._in_string:
                self._read_string(character)
            elif character == '"':
                self._in_string = True
                self._keep(character)
            elif character in "{[":
                self._depth += 1
                if self._depth > 1:
                    self._keep(character)
            elif character in "}]":
                self._depth -= 1
                self._end_value() if self._depth == 0 else self._keep(character)
                self.over = self.over or self._depth == self._outside
            elif self._depth > 1:
                self._keep(character)
            elif character in ":,":
                self._end_key() if character == ":" else self._end_value()
            elif character not in _SPACE:
                self._keep(character)
            if self.over or (self.name is not None) != named:
                return index + 1
        return len(text)

    def take(self) -> str:
        """Return the arguments' text that was not taken yet; an object without any has `{}`."""
        if self.over and not self._given:
            self._given = True
            return "{}"
        taken = "".join(self._arguments)
        self._arguments = []
        return taken

    @property
    def _argues(self) -> bool:
        return self._depth >= 1 and self._key in self._argument_keys

    def _read_string(self, character: str) -> None:
        self._keep(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False

    def _keep(self, character: str) -> None:
        """Arguments that are an object are handed on as they come, all else is kept."""
        if self._argues and (self._piece == [] and (self._depth > 1 or self._given)):
            self._arguments.append(character)
            self._given = True
        else:
            self._piece.append(character)

    def _end_key(self) -> None:
        self._key = _string("".join(self._piece))
        self._piece = []
        self.over = self.over or (self._key is None and not self.begun)

    def _end_value(self) -> None:
        text = "".join(self._piece)
        if self._key == self._name_key and self.name is None:  # a second one changes nothing
            self.name = _string(text)
            self.over = self.over or self.name is None
        elif self._key in self._argument_keys and text:
            inner = _string(text)  # some models write the arguments as a string of JSON
            self._arguments.append(text if inner is None else inner)
            self._given = True
        self._key, self._piece = None, []


class _NamedCall(_CallObject):
    """The tool's name, and maybe an id, before the arguments: `name[CALL_ID]id[ARGS]{…}`."""

    def __init__(self, form: CallFormat) -> None:
        super().__init__(form)
        self._head = ""

    def read(self, text: str) -> int:
        read = 0 if self._outside else self._read_head(text)
        return read + super().read(text[read:]) if self._outside else read

    def _read_head(self, text: str) -> int:
        """Read up to the arguments, or to a mark that is not whole yet."""
        pieces = _HEAD_PIECES.match(text)
        read = pieces.end() if pieces else 0
        self._head += text[:read]
        rest = text[read : read + len(_CALL_ID)]
        if len(self._head) > _MAX_HEAD:
            self.over = True
        elif rest.startswith("{") and (found := _HEAD.fullmatch(self._head)):
            self._outside, self.name = 1, found[1]
            super().read(f'{{"{self._argument_keys[0]}": ')
        elif rest and not _CALL_ID.startswith(rest) and not _ARGS.startswith(rest):
            self.over = True
        return read


_Call = _CallObject | TaggedCall | PythonCall


def _string(text: str) -> str | None:
    """Return the JSON string that this text is, or None."""
    if not text.startswith('"'):
        return None  # unread: lists in lists without end are too deep for a parser
    try:
        value: Any = json.loads(text)
        value.encode()  # half of a character cannot be sent to anybody
    except ValueError:
        return None
    return value
