"""The grammar of a call whose arguments stand between tags, held to the schema of its tool.

Every argument is a rule of its own, in the order of the schema. A string is written as it is, so a
schema is refused that mixes strings with values whose texts could be those of a string, and one
that says what is not understood here: nothing is left out in silence.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from serving.argument_schemas import (
    MAX_SHOWN,
    NOTES,
    argument,
    followed,
    given,
    held,
    only,
    refuse,
    split,
)
from serving.call_tags import END, END_OF_VALUE, FUNCTION, PARAMETER
from serving.parameters import STRING, Schema, as_json, kind_of, types_of

_OF_STRINGS = frozenset(("pattern", "minLength", "maxLength"))
_TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
# Types beside which a string may be any text: what reads as a word of theirs is valid as well.
_WORDS = frozenset(("null", "boolean"))
_UNCLEAR = "may be a string or something else that reads the same, and needs one type"
# What would end an expression here, or look like a control token, written in another way.
_HARMLESS = {'"': r"\x22", "<": r"\x3c", "\n": r"\n", "/": r"\/"}
# Of ASCII in ECMA-262.
_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_", r"\D": "^0-9", r"\W": "^A-Za-z0-9_"}
_NEGATED = (r"\D", r"\W")
_NAMES = re.compile(r"[^<>\n]{1,256}")

# Rules that all calls share. Text goes on to the first end of a value.
TAGGED_RULES = (
    f'free[lazy]: ANY "{END_OF_VALUE}"',
    r"ANY: /(.|\n)*/",
    f"KEY: /{_NAMES.pattern}/",
)


def tagged_rules(rule: str, name: str, schema: Schema, padding: str) -> Iterator[str]:
    """Yield the rule of a call of this tool, and those that it is made of.

    Raises GrammarRefused for what cannot be held.
    """
    parts: list[str] = []
    properties, needed, more = split(schema, name, _NAMES)
    for number, (key, own) in enumerate(properties.items()):
        part = f"{rule}_{number}"
        value, *others = _Value(part, schema, padding, argument(key, name)).rules(own)
        parts.append(part if key in needed else f"{part}?")
        yield f'{part}: {json.dumps(f"{PARAMETER}{key}>{padding}")} {value} "\\n"'
        yield from others
    if more:
        parts.append(f"{rule}_any*")
        yield f'{rule}_any: "{PARAMETER}" KEY ">" free "\\n"'
    yield f'{rule}: {json.dumps(f"{FUNCTION}{name}>")} "\\n" {" ".join(parts)} "{END}"'


class _Value:
    """The rules of one argument's value."""

    def __init__(self, rule: str, root: Schema, padding: str, what: str) -> None:
        self._rule, self._root, self._what = rule, root, what
        self._end = f"{padding}{END_OF_VALUE}"
        self._closing = json.dumps(self._end)

    def rules(self, schema: Any) -> Iterator[str]:
        """Yield what stands between the tags, then rules that it needs."""
        whole: Schema = {} if schema is True else schema
        own, types = followed(whole, self._root, self._what), types_of(whole, self._root)
        said = own.keys() - NOTES
        _types_of(own, self._what)
        if types and "string" not in types:
            yield f"{self._rule}_json {self._closing}"
            yield f"{self._rule}_json: %json {json.dumps(held(whole, self._root, self._what))}"
        elif "enum" in said or "const" in said:
            yield f"({' | '.join(self._texts(own, types))})"
        elif types == STRING and said & _OF_STRINGS:
            yield from self._bound(own)
        elif "anyOf" in said:
            yield from self._choices(own, types)
        else:
            only(own, frozenset({"type"}), self._what)
            if types - STRING - _WORDS:
                self._refuse(_UNCLEAR)
            yield "free"

    def _choices(self, own: Schema, types: frozenset[str]) -> Iterator[str]:
        """Yield the rules of one of several: null beside a string, or any text."""
        only(own, frozenset({"anyOf"}), self._what)
        choices = [
            followed(choice, self._root, self._what)
            for choice in given(own, "anyOf", list, self._what)
        ]
        bound = [choice for choice in choices if choice.keys() - NOTES - {"type"}]
        if not bound and not types - STRING - _WORDS:
            for choice in choices:
                _types_of(choice, self._what)
            yield "free"
            return
        others = [choice for choice in choices if choice is not (bound or choices)[0]]
        if len(bound) != 1 or any(_types_of(each, self._what) != {"null"} for each in others):
            self._refuse(_UNCLEAR)
        if "enum" in bound[0] or "const" in bound[0]:
            texts = [*self._texts(bound[0], types), *([self._literal("null")] if others else [])]
            yield f"({' | '.join(texts)})"
            return
        if types - {"null"} != STRING:
            self._refuse(_UNCLEAR)
        value, *more = self._bound(bound[0])
        yield f"({value} | {self._literal('null')})" if others else value
        yield from more

    def _literal(self, text: str) -> str:
        # With the closing in it: llguidance goes on with the longest text that could match.
        return json.dumps(f"{text}{self._end}")

    def _texts(self, own: Schema, types: frozenset[str]) -> Iterator[str]:
        """Yield the text of each of the values that are allowed."""
        only(own, _OF_STRINGS - {"pattern"} | {"type", "enum", "const"}, self._what)
        values = given(own, "enum", list, self._what) if "enum" in own else [own["const"]]
        if "enum" in own and "const" in own:
            self._refuse("has `enum` and `const`, of which one would do")
        kinds = _types_of(own, self._what)
        least, most = (given(own, key, int, self._what) for key in ("minLength", "maxLength"))
        left = 0
        for value in values:
            kind = kind_of(value)
            if kind not in kinds and not (kind == "integer" and "number" in kinds):
                continue
            if isinstance(value, str) and not least <= len(value) <= (
                most if "maxLength" in own else len(value)
            ):
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            read = json.loads(as_json(text, types))
            if END_OF_VALUE in text or (read, kind_of(read)) != (value, kind):
                self._refuse(f"may be {text[:MAX_SHOWN]!r}, which would be read otherwise")
            left += 1
            yield self._literal(text)
        if not left:
            self._refuse("has no value that its schema allows")

    def _bound(self, own: Schema) -> Iterator[str]:
        """Yield the rules of a text that has to match expressions, all of them."""
        only(own, _OF_STRINGS | {"type"}, self._what)
        terminal = self._rule.upper()
        least, most = (given(own, key, int, self._what) for key in ("minLength", "maxLength"))
        bounds = [
            r"~/(.|\n)*<\/parameter>(.|\n)*/",
            rf"/(.|\n){{{least},{most if 'maxLength' in own else ''}}}/",
        ]
        if pattern := given(own, "pattern", str, self._what):
            bounds.append(self._expression(pattern))
        yield f"{self._rule}_text"
        yield f"{self._rule}_text[lazy]: {terminal} {self._closing}"
        yield f"{terminal}: {' & '.join(bounds)}"

    def _expression(self, pattern: str) -> str:
        """Return an expression as ECMA-262 has it in the form that llguidance reads."""
        begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern)
        depth, in_class, inner = 0, False, ""
        for found in re.finditer(r"\\.|.", pattern[begins : -1 if ends else None], re.DOTALL):
            mark = found[0]
            if mark == "|" and not depth and not in_class and (begins or ends):
                self._refuse("has a pattern with choices beside ^ or $: group them")
            if mark in _NEGATED and in_class:
                self._refuse(f"has a pattern with {mark} in brackets")
            if mark in _CLASSES:
                inner += _CLASSES[mark] if in_class else f"[{_CLASSES[mark]}]"
            elif in_class and mark in "[&~":  # sets of sets, which ECMA-262 has not
                inner += f"\\{mark}"
            else:
                inner += _HARMLESS.get(mark.removeprefix("\\"), mark)
            depth += 0 if in_class else (mark == "(") - (mark == ")")
            if depth < 0:
                self._refuse("has a pattern that closes a parenthesis which is not open")
            in_class = mark == "[" or (in_class and mark != "]")
        before, after = ("" if held else r"(.|\n)*" for held in (begins, ends))
        return f"/{before}({inner}){after}/"

    def _refuse(self, reason: str) -> NoReturn:
        refuse(f"{self._what} {reason}")


def _types_of(schema: Schema, what: str) -> frozenset[str]:
    """Return the types that a schema names; all where it names none."""
    named = schema.get("type")
    types = _TYPES if named is None else named if isinstance(named, list) else [named]
    if not types or not all(isinstance(each, str) and each in _TYPES for each in types):
        refuse(f"{what} is of type {json.dumps(named)[:MAX_SHOWN]}")
    return frozenset(types)
