"""Arguments that a model writes as plain text, and what they are by the schema of their tool.

Some families write every argument between tags: a string as it is, all else as JSON, or as Python
prints it.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any, NoReturn, cast

Schema = Mapping[str, Any]

STRING = frozenset({"string"})
_MAX_REFERENCES = 8  # one behind the other
_MAX_LITERAL = 65_536  # characters
_WORDS = {"True": "true", "False": "false", "None": "null"}
# `bool` is an `int` in Python: it comes first.
_KINDS: tuple[tuple[type, str], ...] = (
    *((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")),
    *((list, "array"), (dict, "object")),
)


def parameter(tool: Schema, key: str) -> Schema:
    """Return the schema of one argument, given that of all; empty where it may be anything."""
    properties = tool.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # JSON
    if found is None:
        found = tool.get("additionalProperties")
    return resolved(found, tool)


def resolved(schema: Any, tool: Schema) -> Schema:
    """Follow references into the tool's own definitions; what leads nowhere may be anything."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return {}
        own = cast("Schema", schema)
        reference = own.get("$ref")
        if not isinstance(reference, str):
            return own
        schema = _at(reference, tool)
    return {}


def types_of(schema: Schema, tool: Schema) -> frozenset[str]:
    """Return the names of the JSON types that it allows; none: that is not known."""
    if "const" in schema:
        return frozenset({kind_of(schema["const"])})
    if isinstance(values := schema.get("enum"), list):
        return frozenset(map(kind_of, cast("list[Any]", values)))
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset({named})
    if isinstance(named, list):
        return frozenset(each for each in cast("list[Any]", named) if isinstance(each, str))
    choices = schema.get("anyOf", schema.get("oneOf"))
    if not isinstance(choices, list):
        return frozenset()
    each = [types_of(resolved(choice, tool), tool) for choice in cast("list[Any]", choices)]
    return frozenset().union(*each) if all(each) else frozenset()


def kind_of(value: Any) -> str:
    """Return the name of its JSON type."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def as_json(text: str, types: frozenset[str]) -> str:
    """Return the JSON text of an argument of one of these types that was written as `text`.

    What is no JSON is a string, and so is everything where only strings are allowed.
    """
    found = None if types == STRING else _read(text.strip())
    if found is not None:
        written, kind = found
        wanted = types | {"integer"} if "number" in types else types
        if kind in wanted or ("string" not in wanted and (wanted or kind != "string")):
            return written
    return json.dumps(text, ensure_ascii=False)


def _at(reference: str, tool: Schema) -> Any:
    """Return what a reference inside the schema (`#/$defs/name`) points at."""
    root, *path = reference.split("/")
    found: Any = tool if root == "#" else None
    for step in path:
        key = step.replace("~1", "/").replace("~0", "~")  # RFC 6901
        found = cast("Schema", found).get(key) if isinstance(found, Mapping) else None
    return found


def _read(text: str) -> tuple[str, str] | None:
    """Return the JSON text of a value and its type; None where it is none."""
    text = _WORDS.get(text, text)
    try:
        return text, kind_of(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("[", "{")) or len(text) > _MAX_LITERAL:
        return None
    try:
        value = ast.literal_eval(text)
        return json.dumps(value, ensure_ascii=False, allow_nan=False), kind_of(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")
