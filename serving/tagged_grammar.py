"""The grammar of a call whose arguments stand between tags, held to the schema of its tool.

Every argument is a rule of its own, in the order of the schema. A string is written as it is, so a
schema is refused that mixes strings with values whose texts could be those of a string.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from serving.call_tags import END, END_OF_VALUE, FUNCTION, PARAMETER
from serving.engine.boundary import GrammarRefused
from serving.engine.grammar import JSON_SPACE
from serving.parameters import STRING, Schema, parameter, resolved, types_of

_MAX_PARAMETERS = 256  # of a tool
# What says nothing of which values are valid. In JSON Schema `format` is such a note, too.
_NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "format", "deprecated", "readOnly"),
        *("writeOnly", "contentMediaType", "contentEncoding", "$comment", "$schema", "$id"),
    )
)
_DEFINITIONS = frozenset({"$defs", "definitions"})
_OF_OBJECTS = frozenset({"type", "properties", "required", "additionalProperties"}) | _DEFINITIONS
_OF_STRINGS = frozenset({"type", "pattern", "minLength", "maxLength"})
_OF_CHOICES = frozenset({"type", "anyOf", "oneOf"})
# Types beside which a string may be any text: what reads as a word of theirs is valid as well.
_WORDS = frozenset({"null", "boolean"})

_HARMLESS = {'"': r"\x22", "<": r"\x3c", "\n": r"\n", "/": r"\/"}

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
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    tool = {**definitions, **resolved(schema, schema)}
    _only(tool, _OF_OBJECTS, f"the arguments of {name!r}")
    needed = _given(tool, "required", list, f"the arguments of {name!r}")
    properties = _given(tool, "properties", dict, f"the arguments of {name!r}")
    keys: dict[str, None] = dict.fromkeys(map(str, [*properties, *needed]))
    if len(keys) > _MAX_PARAMETERS:
        _refuse(f"{name!r} has {len(keys)} parameters; it may have {_MAX_PARAMETERS}")
    parts: list[str] = []
    for number, key in enumerate(keys):
        part, what = f"{rule}_{number}", f"parameter {key!r} of {name!r}"
        if not re.fullmatch(r"[^<>\n]{1,256}", key):
            _refuse(f"the name of {what} cannot stand in a tag")
        parts.append(part if key in needed else f"{part}?")
        own = parameter(tool, key)
        value, *more = _value(part, {**definitions, **own}, types_of(own, tool), what, padding)
        opening = json.dumps(f"{PARAMETER}{key}>{padding}")
        yield f'{part}: {opening} {value} "\\n"'
        yield from more
    if "properties" not in tool and tool.get("additionalProperties") is not False:
        parts.append(f"{rule}_any*")
        yield f'{rule}_any: "{PARAMETER}" KEY ">" free "\\n"'
    yield f'{rule}: "{FUNCTION}{name}>\\n" {" ".join(parts)} "{END}"'


def _value(
    rule: str, schema: Schema, types: frozenset[str], what: str, padding: str
) -> Iterator[str]:
    """Yield what stands between the tags, then rules that it needs."""
    closing = json.dumps(f"{padding}{END_OF_VALUE}")
    own = {key: each for key, each in schema.items() if key not in _DEFINITIONS}
    if types and "string" not in types:
        held = {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **schema}
        yield f"{rule}_json {closing}"
        yield f"{rule}_json: %json {json.dumps(held)}"
    elif "enum" in own or "const" in own:
        values = [own["const"]] if "const" in own else _given(own, "enum", list, what)
        texts = [_text(each, what) for each in values]
        yield f"({' | '.join(texts)}) {closing}"
    elif types == STRING and own.keys() & (_OF_STRINGS - {"type"}):
        _only(own, _OF_STRINGS, what)
        yield f"{rule}_text"
        yield f"{rule}_text[lazy]: {rule.upper()} {closing}"
        yield f"{rule.upper()}: {' & '.join(_bounds(own, what))}"
    else:
        _only(own, _OF_CHOICES, what)
        choices = [each for key in ("anyOf", "oneOf") for each in _given(own, key, list, what)]
        if types - STRING - _WORDS or any(map(_is_held, choices)):
            _refuse(f"{what} may be a string or something else that reads the same")
        yield "free"


def _bounds(schema: Schema, what: str) -> Iterator[str]:
    """Yield expressions that the text of a string has to match, all of them."""
    yield r"~/(.|\n)*<\/parameter>(.|\n)*/"
    least, most = (_given(schema, key, int, what) for key in ("minLength", "maxLength"))
    yield rf"/(.|\n){{{least},{most if 'maxLength' in schema else ''}}}/"
    if pattern := _given(schema, "pattern", str, what):
        begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", pattern)
        if "|" in pattern and (begins or ends):
            _refuse(f"the pattern of {what} has choices beside ^ or $, which could mean both")
        inner = re.sub(r'\\?["<\n/]|\\.', _harmless, pattern[begins : -1 if ends else None])
        before, after = ("" if held else r"(.|\n)*" for held in (begins, ends))
        yield f"/{before}({inner}){after}/"


def _harmless(found: re.Match[str]) -> str:
    """Write what would end an expression, or look like a control token, in another way."""
    return _HARMLESS.get(found[0].removeprefix("\\"), found[0])


def _text(value: Any, what: str) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if END_OF_VALUE in text:
        _refuse(f"a value of {what} holds {END_OF_VALUE}")
    return json.dumps(text)


def _given(schema: Schema, key: str, kind: type, what: str) -> Any:
    """Return what a schema says there, or the empty value of that type."""
    found = schema.get(key, kind())
    if not isinstance(found, kind):
        _refuse(f"{key!r} of {what} is {json.dumps(found)[:40]}")
    return found


def _is_held(choice: Any) -> bool:
    """Tell whether one of several choices holds text to more than its type."""
    return not isinstance(choice, dict) or bool(choice.keys() - _NOTES - {"type"})


def _only(schema: Schema, known: frozenset[str], what: str) -> None:
    """Refuse what is said beyond these keys."""
    if unknown := sorted(schema.keys() - known - _NOTES):
        _refuse(f"{what}: this base model writes them as text, which {unknown[0]!r} does not bind")


def _refuse(reason: str) -> NoReturn:
    raise GrammarRefused(f"A call cannot be held to this schema: {reason}.")
