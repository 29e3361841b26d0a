"""The grammar of a call whose arguments stand between tags, held to the schema of its tool.

Every argument is a rule of its own, in the order of the schema. A string is written as it is, so a
schema is refused that mixes strings with values whose texts could be those of a string, and one
that says what is not understood here: nothing is left out in silence.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from serving.call_tags import END, END_OF_VALUE, FUNCTION, PARAMETER
from serving.engine.boundary import GrammarRefused
from serving.engine.grammar import JSON_SPACE, MAX_SOURCE_CHARACTERS
from serving.parameters import (
    MAX_REFERENCES,
    STRING,
    Schema,
    as_json,
    kind_of,
    reference,
    types_of,
)

_MAX_PARAMETERS = 256  # of a tool
_SHOWN = 64  # characters of a name or value in a message
# What says nothing of which values are valid. In JSON Schema `format` is such a note, too.
_NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "format", "deprecated", "readOnly"),
        *("writeOnly", "contentMediaType", "contentEncoding", "$comment", "$schema", "$id"),
    )
)
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties", *_DEFINITIONS))
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

# Rules that all calls share. Text goes on to the first end of a value.
SHARED_RULES = (
    f'free[lazy]: ANY "{END_OF_VALUE}"',
    r"ANY: /(.|\n)*/",
    r"KEY: /[^<>\n]{1,256}/",
)


def tagged_rules(rule: str, name: str, schema: Schema, padding: str) -> Iterator[str]:
    """Yield the rule of a call of this tool, and those that it is made of.

    Raises GrammarRefused for what cannot be held.
    """
    if len(json.dumps(schema)) > MAX_SOURCE_CHARACTERS:
        _refuse(f"that of {name!r} has more than {MAX_SOURCE_CHARACTERS} characters")
    parts: list[str] = []
    properties, needed, more = _split(schema, f"{name!r}")
    for number, (key, own) in enumerate(properties.items()):
        part, what = f"{rule}_{number}", f"{key[:_SHOWN]!r} of {name!r}"
        if not re.fullmatch(r"[^<>\n]{1,256}", key):
            _refuse(f"the name of {what} cannot stand in a tag")
        value, *others = _Value(part, schema, padding, what).rules(own)
        parts.append(part if key in needed else f"{part}?")
        yield f'{part}: {json.dumps(f"{PARAMETER}{key}>{padding}")} {value} "\\n"'
        yield from others
    if more:
        parts.append(f"{rule}_any*")
        yield f'{rule}_any: "{PARAMETER}" KEY ">" free "\\n"'
    yield f'{rule}: {json.dumps(f"{FUNCTION}{name}>")} "\\n" {" ".join(parts)} "{END}"'


def _split(schema: Schema, what: str) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Return the arguments that may be given, which have to be, and whether any others may."""
    own = _followed(schema, schema, what)
    _only(own, _OF_OBJECTS, what)
    if own.get("type", "object") != "object":
        _refuse(f"{what} takes a {str(own['type'])[:_SHOWN]!r}, and arguments are an object")
    properties: dict[str, Any] = {**_given(own, "properties", dict, what)}
    needed = _given(own, "required", list, what)
    if not all(isinstance(key, str) for key in needed):
        _refuse(f"`required` of {what} has something else than names")
    others = own.get("additionalProperties", True)
    if not isinstance(others, bool) and "properties" not in own:
        _refuse(f"{what} binds arguments that it does not name")
    properties = {**properties, **{key: others for key in needed if key not in properties}}
    if banned := [key for key in needed if properties[key] is False]:
        _refuse(f"{what} requires {banned[0][:_SHOWN]!r}, which it does not allow")
    allowed = {key: each for key, each in properties.items() if each is not False}
    if len(allowed) > _MAX_PARAMETERS:
        _refuse(f"{what} has {len(allowed)} parameters; it may have {_MAX_PARAMETERS}")
    return allowed, frozenset(needed), "properties" not in own and others is True and not needed


class _Value:
    """The rules of one argument's value."""

    def __init__(self, rule: str, root: Schema, padding: str, what: str) -> None:
        self._rule, self._root, self._what = rule, root, what
        self._end = f"{padding}{END_OF_VALUE}"
        self._closing = json.dumps(self._end)

    def rules(self, schema: Any) -> Iterator[str]:
        """Yield what stands between the tags, then rules that it needs."""
        given: Schema = {} if schema is True else schema
        own, types = _followed(given, self._root, self._what), types_of(given, self._root)
        said = own.keys() - _NOTES
        _types_of(own, self._what)
        if types and "string" not in types:
            yield f"{self._rule}_json {self._closing}"
            yield f"{self._rule}_json: %json {json.dumps(self._held(given))}"
        elif "enum" in said or "const" in said:
            yield f"({' | '.join(self._texts(own, types))})"
        elif types == STRING and said & _OF_STRINGS:
            yield from self._bound(own)
        elif "anyOf" in said:
            yield from self._choices(own, types)
        else:
            _only(own, frozenset({"type"}), self._what)
            if types - STRING - _WORDS:
                self._refuse(_UNCLEAR)
            yield "free"

    def _choices(self, own: Schema, types: frozenset[str]) -> Iterator[str]:
        """Yield the rules of one of several: null beside a string, or any text."""
        _only(own, frozenset({"anyOf"}), self._what)
        choices = [
            _followed(choice, self._root, self._what)
            for choice in _given(own, "anyOf", list, self._what)
        ]
        bound = [choice for choice in choices if choice.keys() - _NOTES - {"type"}]
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

    def _held(self, schema: Schema) -> dict[str, Any]:
        """Return a schema with the definitions that it refers to."""
        held: dict[str, Any] = {**schema}
        if any(key in schema for key in _DEFINITIONS):
            self._refuse("has definitions of its own")
        found, waiting = set[str](), [json.dumps(schema, ensure_ascii=False)]
        while waiting:
            for pointer in re.findall(r'"\$ref": "((?:[^"\\]|\\.)*)"', waiting.pop()):
                where, _, key = pointer.removeprefix("#/").partition("/")
                inside = self._root.get(where) if where in _DEFINITIONS else None
                if not isinstance(inside, dict) or key not in inside or pointer[:1] != "#":
                    self._refuse(f"refers to {pointer[:_SHOWN]!r}, no definition of its")
                if pointer not in found:
                    found.add(pointer)
                    held.setdefault(where, {})[key] = inside[key]
                    waiting.append(json.dumps(inside[key], ensure_ascii=False))
        return {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **held}

    def _texts(self, own: Schema, types: frozenset[str]) -> Iterator[str]:
        """Yield the text of each of the values that are allowed."""
        _only(own, _OF_STRINGS - {"pattern"} | {"type", "enum", "const"}, self._what)
        values = _given(own, "enum", list, self._what) if "enum" in own else [own["const"]]
        if "enum" in own and "const" in own:
            self._refuse("has `enum` and `const`, of which one would do")
        kinds = _types_of(own, self._what)
        least, most = (_given(own, key, int, self._what) for key in ("minLength", "maxLength"))
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
                self._refuse(f"may be {text[:_SHOWN]!r}, which would be read otherwise")
            left += 1
            yield self._literal(text)
        if not left:
            self._refuse("has no value that its schema allows")

    def _bound(self, own: Schema) -> Iterator[str]:
        """Yield the rules of a text that has to match expressions, all of them."""
        _only(own, _OF_STRINGS | {"type"}, self._what)
        terminal = self._rule.upper()
        least, most = (_given(own, key, int, self._what) for key in ("minLength", "maxLength"))
        bounds = [
            r"~/(.|\n)*<\/parameter>(.|\n)*/",
            rf"/(.|\n){{{least},{most if 'maxLength' in own else ''}}}/",
        ]
        if pattern := _given(own, "pattern", str, self._what):
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
        _refuse(f"{self._what} {reason}")


def _followed(schema: Any, root: Schema, what: str) -> Schema:
    """Return what a schema refers to, if nothing beside a reference would be left out."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict):
            _refuse(f"{what} has a schema that is none, or refers to what is not there")
        key, found = reference(schema, root)
        if not key:
            return schema
        _only(schema, frozenset((key, *_DEFINITIONS)), what)
        schema = found
    return _refuse(f"{what} refers to what refers to something else, too often")


def _types_of(schema: Schema, what: str) -> frozenset[str]:
    """Return the types that a schema names; all where it names none."""
    named = schema.get("type")
    types = _TYPES if named is None else named if isinstance(named, list) else [named]
    if not types or not all(isinstance(each, str) and each in _TYPES for each in types):
        _refuse(f"{what} is of type {json.dumps(named)[:_SHOWN]}")
    return frozenset(types)


def _given(schema: Schema, key: str, kind: type, what: str) -> Any:
    """Return what a schema says there, or the empty value of that type."""
    found = schema.get(key, kind())
    if kind_of(found) != kind_of(kind()) or (kind is int and found < 0):
        _refuse(f"{key!r} of {what} is {json.dumps(found)[:_SHOWN]}")
    return found


def _only(schema: Schema, known: frozenset[str], what: str) -> None:
    """Refuse what is said beyond these keys."""
    if unknown := sorted(schema.keys() - known - _NOTES):
        _refuse(f"{unknown[0][:_SHOWN]!r} of {what} cannot be held where arguments are text")


def _refuse(reason: str) -> NoReturn:
    raise GrammarRefused(
        f"A call cannot be held to this schema: {reason}. Change that, or let the model write the "
        "arguments as it likes, with neither `strict` nor a call that is required."
    )
