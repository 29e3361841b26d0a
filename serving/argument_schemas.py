"""What the schema of a tool's arguments says, where each argument is held by a rule of its own.

A schema is refused that says what is not understood here: nothing is left out in silence.
"""

import json
import re
from typing import Any, NoReturn

from serving.engine.boundary import GrammarRefused
from serving.engine.grammar import JSON_SPACE, MAX_SOURCE_CHARACTERS
from serving.parameters import MAX_REFERENCES, Schema, kind_of, reference

MAX_SHOWN = 64  # characters of a name or value in a message
_MAX_PARAMETERS = 256  # of a tool
# What says nothing of which values are valid. In JSON Schema `format` is such a note, too.
NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "format", "deprecated", "readOnly"),
        *("writeOnly", "contentMediaType", "contentEncoding", "$comment", "$schema", "$id"),
    )
)
_DEFINITIONS = ("$defs", "definitions")
_OF_OBJECTS = frozenset(("type", "properties", "required", "additionalProperties", *_DEFINITIONS))


def split(
    schema: Schema, name: str, names: re.Pattern[str]
) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Return the arguments that a tool takes, which it needs, and whether it takes any others.

    `names`: what an argument may be called. Raises GrammarRefused for what cannot be held.
    """
    what = f"{name!r}"
    if len(json.dumps(schema)) > MAX_SOURCE_CHARACTERS:
        refuse(f"that of {what} has more than {MAX_SOURCE_CHARACTERS} characters")
    own = followed(schema, schema, what)
    only(own, _OF_OBJECTS, what)
    if own.get("type", "object") != "object":
        refuse(f"{what} takes a {str(own['type'])[:MAX_SHOWN]!r}, and arguments are an object")
    properties: dict[str, Any] = {**given(own, "properties", dict, what)}
    needed = given(own, "required", list, what)
    if not all(isinstance(key, str) for key in needed):
        refuse(f"`required` of {what} has something else than names")
    others = own.get("additionalProperties", True)
    if not isinstance(others, bool) and "properties" not in own:
        refuse(f"{what} binds arguments that it does not name")
    properties = {**properties, **{key: others for key in needed if key not in properties}}
    if banned := [key for key in needed if properties[key] is False]:
        refuse(f"{what} requires {banned[0][:MAX_SHOWN]!r}, which it does not allow")
    allowed = {key: each for key, each in properties.items() if each is not False}
    if len(allowed) > _MAX_PARAMETERS:
        refuse(f"{what} has {len(allowed)} parameters; it may have {_MAX_PARAMETERS}")
    for key in allowed:
        if not names.fullmatch(key):
            refuse(f"the name of {argument(key, name)} cannot stand in a call of this base model")
    return allowed, frozenset(needed), "properties" not in own and others is True and not needed


def argument(key: str, name: str) -> str:
    """Return what an argument of a tool is called in messages."""
    return f"{key[:MAX_SHOWN]!r} of {name!r}"


def held(schema: Schema, root: Schema, what: str) -> dict[str, Any]:
    """Return a schema of JSON with the definitions of `root` that it refers to."""
    made: dict[str, Any] = {**schema}
    if any(key in schema for key in _DEFINITIONS):
        refuse(f"{what} has definitions of its own")
    found, waiting = set[str](), [json.dumps(schema, ensure_ascii=False)]
    while waiting:
        for pointer in re.findall(r'"\$ref": "((?:[^"\\]|\\.)*)"', waiting.pop()):
            where, _, key = pointer.removeprefix("#/").partition("/")
            inside = root.get(where) if where in _DEFINITIONS else None
            if not isinstance(inside, dict) or key not in inside or pointer[:1] != "#":
                refuse(f"{what} refers to {pointer[:MAX_SHOWN]!r}, no definition of its")
            if pointer not in found:
                found.add(pointer)
                made.setdefault(where, {})[key] = inside[key]
                waiting.append(json.dumps(inside[key], ensure_ascii=False))
    return {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **made}


def followed(schema: Any, root: Schema, what: str) -> Schema:
    """Return what a schema refers to, if nothing beside a reference would be left out."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict):
            refuse(f"{what} has a schema that is none, or refers to what is not there")
        key, found = reference(schema, root)
        if not key:
            return schema
        only(schema, frozenset((key, *_DEFINITIONS)), what)
        schema = found
    return refuse(f"{what} refers to what refers to something else, too often")


def given(schema: Schema, key: str, kind: type, what: str) -> Any:
    """Return what a schema says there, or the empty value of that type."""
    found = schema.get(key, kind())
    if kind_of(found) != kind_of(kind()) or (kind is int and found < 0):
        refuse(f"{key!r} of {what} is {json.dumps(found)[:MAX_SHOWN]}")
    return found


def only(schema: Schema, known: frozenset[str], what: str) -> None:
    """Refuse what is said beyond these keys."""
    if unknown := sorted(schema.keys() - known - NOTES):
        refuse(f"{unknown[0][:MAX_SHOWN]!r} of {what} cannot be held in this base model's calls")


def refuse(reason: str) -> NoReturn:
    """Raise GrammarRefused."""
    raise GrammarRefused(
        f"A call cannot be held to this schema: {reason}. Change that, or let the model write the "
        "arguments as it likes, with neither `strict` nor a call that is required."
    )
