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
UNKNOWN: frozenset[str] = frozenset()
MAX_REFERENCES = 8  # one behind the other
_MAX_LOOKED_AT = 4096  # choices and values of one argument
_MAX_LITERAL = 65_536  # characters
_WORDS = {"True": "true", "False": "false", "None": "null"}
# `bool` is an `int` in Python: it comes first.
_KINDS: tuple[tuple[type, str], ...] = (
    *((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")),
    *((list, "array"), (dict, "object")),
)


class Arguments:
    """The schemas of a tool's arguments. What they do not say, or too deep, may be anything."""

    def __init__(self, schema: Schema) -> None:
        self._root = schema
        self._own = follow(schema, schema) or {}
        properties = self._own.get("properties")
        named: Schema = properties if isinstance(properties, Mapping) else {}
        self._properties, self.names = named, tuple(named)
        self._types: dict[str, frozenset[str]] = {}

    def types(self, key: str) -> frozenset[str]:
        """Return the names of the JSON types that an argument may have, or UNKNOWN."""
        if key not in self._types:
            found = self._properties.get(key)
            found = self._own.get("additionalProperties") if found is None else found
            self._types[key] = types_of(found, self._root)
        return self._types[key]


def follow(schema: Any, root: Schema) -> Schema | None:
    """Return what a schema refers to, or itself; None where that leads nowhere."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping):
            return None
        own = cast("Schema", schema)
        key, schema = reference(own, root)
        if not key:
            return own
    return None


def reference(schema: Schema, root: Schema) -> tuple[str, Any]:
    """Return the key by which a schema stands for another one, and that one; or "", and itself."""
    if isinstance(where := schema.get("$ref"), str):
        return "$ref", _at(where, root)
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(cast("list[Any]", parts)) == 1:
        return "allOf", parts[0]
    return "", schema


def types_of(schema: Any, root: Schema) -> frozenset[str]:
    """Return the names of the JSON types that a schema allows, or UNKNOWN."""
    waiting, found = [schema], set[str]()
    for looked_at in range(_MAX_LOOKED_AT):
        if not waiting:
            return frozenset(found)
        own = follow(waiting.pop(), root) or {}
        named, values = own.get("type"), [own["const"]] if "const" in own else own.get("enum")
        choices = own.get("anyOf", own.get("oneOf"))
        if isinstance(named, str):
            found.add(named)
        elif isinstance(named, list):
            found.update(filter(_is_text, cast("list[Any]", named)))
        elif isinstance(values, list) and len(values) < _MAX_LOOKED_AT - looked_at:
            found.update(map(kind_of, values))
        elif isinstance(choices, list) and choices:
            waiting += cast("list[Any]", choices)[:_MAX_LOOKED_AT]
        else:
            break
    return UNKNOWN


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
        if kind in wanted - STRING or ("string" not in wanted and (wanted or kind != "string")):
            return written
    return json.dumps(text, ensure_ascii=False)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _at(where: str, root: Schema) -> Any:
    """Return what a reference inside the schema (`#/$defs/name`) points at."""
    start, *path = where.split("/")
    found: Any = root if start == "#" else None
    for step in path:
        key = step.replace("~1", "/").replace("~0", "~")  # RFC 6901
        found = cast("Schema", found).get(key) if isinstance(found, Mapping) else None
    return found


def _read(text: str) -> tuple[str, str] | None:
    """Return the JSON text of a value and its type; None where it is none."""
    text = _WORDS.get(text, text)
    try:
        # Python turns no integer of 5,000 digits into one, and which it is does not matter.
        value = json.loads(text, parse_int=len, parse_constant=_refuse)
        return text, kind_of(value)
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("[", "{")) or len(text) > _MAX_LITERAL:
        return None
    try:
        written = json.dumps(ast.literal_eval(text), allow_nan=False)
        value = json.loads(written)  # where keys that Python tells apart are one
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return json.dumps(value), kind_of(value)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"JSON has no {constant}")
