"""JSON from people: bounded before it is read, strictly parsed, canonical when written."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from registry.errors import refused

MAX_DEPTH = 32


class DuplicateKey(ValueError):
    """A key that one object has twice: readers differ in which of the two they take."""

    def __init__(self, key: str) -> None:
        super().__init__(f"duplicate key {key!r}")
        self.key = key


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read one JSON object. Refuses what is too large, too deep, ambiguous or not an object."""
    check_size(path, max_bytes)
    return parse_object(path.read_bytes(), path.name)


def check_size(path: Path, max_bytes: int) -> None:
    """Raise Refused for a file that is too large to be read."""
    size = path.stat().st_size
    if size > max_bytes:
        raise refused("too_large", f"{path.name} has {size} bytes, the limit is {max_bytes}.")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; `what` names it in the refusal."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise refused("json_invalid", f"{what} is nested too deeply to be read.") from None
    except ValueError as error:
        raise refused("json_invalid", f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise refused("json_invalid", f"{what} holds a {type(value).__name__}, not an object.")
    found = cast("dict[str, Any]", value)
    if _deeper_than(found, MAX_DEPTH):
        raise refused("json_invalid", f"{what} is nested deeper than {MAX_DEPTH} levels.")
    try:
        if b"\\u" in data:
            canonical(found)
    except UnicodeEncodeError as error:
        # The escape \ud800 is JSON, and half a character that no file or database can hold.
        raise refused("json_invalid", f"{what} holds a text that is not Unicode.") from error
    return found


def canonical(value: object) -> bytes:
    """Write JSON that is equal for equal values: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode("utf-8")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, as a hook of `json`. Raises DuplicateKey."""
    result = dict(pairs)
    if len(result) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DuplicateKey(twice)
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return number


def _deeper_than(value: object, levels: int) -> bool:
    """Tell whether containers are nested deeper than `levels`, without recursion."""
    layer: list[object] = [value]
    for _ in range(levels):
        layer = [child for parent in layer for child in _children(parent)]
        if not layer:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else ()
