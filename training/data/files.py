"""Examples from files: CSV and JSONL with two columns, JSONL of messages, parquet from the Hub."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.data.duplicates import normalise
from training.data.examples import Example, Turn
from training.errors import DataError
from training.recipe import DataSource

Row = Mapping[str, Any]


def read_examples(
    path: Path, data: DataSource, system: str, rename: Mapping[str, str]
) -> list[Example]:
    """Read every row of a file; the first wrong one is named with its line."""
    if not path.is_file():
        raise DataError(f"There is no data at {path}. Give it with --set data.path=FILE.")
    examples: list[Example] = []
    for line, row in _rows(path):
        where = f"{path}:{line}"
        renamed = {rename.get(key, key): item for key, item in row.items()}
        if "messages" in renamed:
            turns, completion = _conversation(renamed["messages"], system, where)
        else:
            turns = (Turn("user", _text(renamed, data.prompt, where)),)
            completion = _text(renamed, data.completion, where)
        group = _text(renamed, data.group, where) if data.group else _default_group(turns)
        examples.append(Example(turns, completion, group))
    if not examples:
        raise DataError(f"{path} has no rows.")
    return examples


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    match path.suffix.lower():
        case ".csv":
            return _csv_rows(path)
        case ".jsonl":
            return _jsonl_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case suffix:
            raise DataError(f"{path} ends in {suffix!r}; data files are .csv, .jsonl or .parquet.")


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="(beyond the header)", strict=True)
        for row in reader:
            if "(beyond the header)" in row:
                raise DataError(f"{path}:{reader.line_num} has more cells than the header.")
            yield reader.line_num, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number} is a {type(row).__name__}, not an object.")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Read rows; a class label becomes its name, which the file's own metadata holds."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path.name} is a parquet file, and reading one needs the package pyarrow: "
            "pip install pyarrow. Or give the rows as CSV: --set data.path=FILE.csv."
        ) from error
    table = parquet.read_table(path)
    names = _label_names(table.schema.metadata or {})
    for number, row in enumerate(table.to_pylist(), start=1):
        yield (
            number,
            {
                key: names[key][item] if key in names and item is not None else item
                for key, item in row.items()
            },
        )


def _label_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return column → names of its classes, from the note that `datasets` leaves in the file."""
    note = json.loads(metadata.get(b"huggingface", b"{}"))
    features = note.get("info", {}).get("features", {})
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise DataError(
            f"{where} has no column {column!r}, only {', '.join(map(repr, row))}. Name the "
            "columns with data.prompt, data.completion and data.group."
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {value!r}, not text.")
    return value


def _conversation(messages: Any, system: str, where: str) -> tuple[tuple[Turn, ...], str]:
    """Return the turns before the last answer, and that answer."""
    turns: list[Turn] = []
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        role, content = _role_and_content(message, where)
        if role == "system":
            _check_system(content, system, number, where)
        elif role in ("user", "assistant"):
            turns.append(Turn(role, content))
        else:
            raise DataError(f"{where}: a message has the role {role!r}.")
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if len(turns) < 2 or len(turns) % 2 or [turn.role for turn in turns] != expected:
        raise DataError(
            f"{where}: messages must alternate user and assistant and end with the assistant's."
        )
    return tuple(turns[:-1]), turns[-1].content


def _role_and_content(message: Any, where: str) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: a message needs a role and a content of text, not {message!r}.")
    return role, content


def _check_system(content: str, system: str, number: int, where: str) -> None:
    """Every row is asked under the recipe's system prompt: the version serves only that one."""
    if number != 0 or content != system:
        raise DataError(
            f"{where}: the system message {content!r} is not the recipe's task.system {system!r}. "
            "Take it out of the rows; the recipe's is put before each."
        )


def _default_group(turns: tuple[Turn, ...]) -> str:
    return "\n".join(normalise(turn.content) for turn in turns)
