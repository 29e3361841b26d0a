"""Examples from files: CSV, JSONL and parquet, in one of three formats.

| format | columns of a row |
|---|---|
| `prompt-completion` | the two that the recipe names: texts, or lists of messages |
| `messages` | `messages`: a list of {"role", "content"} that ends with the assistant's |
| `alpaca` | `instruction`, `output`, and `input` where there is one |

`data.format` names it; without it, the columns of the first row do, and a row that could be two
formats is refused.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from training.data.duplicates import normalise
from training.data.examples import Example, Turn
from training.errors import BadRow, DataError
from training.recipe import DataFormat, DataSource

Row = Mapping[str, Any]
Asked = tuple[tuple[Turn, ...], str]  # the turns before the last answer, and that answer


def read_rows(
    path: Path, data: DataSource, system: str, rename: Mapping[str, str]
) -> Iterator[Example | BadRow]:
    """Yield every row as an example, or what is wrong with it. Raises DataError for the file."""
    if not path.is_file():
        raise DataError(f"There is no data at {path}. Give it with --set data.path=FILE.")
    try:
        rows = _rows(path)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{path} has no rows.")
        form = data.format or _format(first[1], data, rename, path)
        for line, row in chain([first], rows):
            yield _read(row, form, data, system, rename, f"{path.name}:{line}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason}.") from error


def _read(
    row: Row | str,
    form: DataFormat,
    data: DataSource,
    system: str,
    rename: Mapping[str, str],
    where: str,
) -> Example | BadRow:
    if isinstance(row, str):
        return BadRow(where, row, "unreadable")
    row = {rename.get(key, key): item for key, item in row.items()}
    try:
        match form:
            case "prompt-completion":
                turns, completion = _columns(row, data, system, where)
            case "messages":
                turns, completion = _conversation(row.get("messages"), system, where)
            case "alpaca":
                turns, completion = _alpaca(row, system, where)
        group = _text(row, data.group, where) if data.group else _default_group(turns)
    except BadRow as bad:
        return bad
    return Example(turns, completion, group, where)


def _rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row), or (line, why it is none)."""
    match path.suffix.lower():
        case ".csv":
            return _csv_rows(path)
        case ".jsonl":
            return _jsonl_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case suffix:
            raise DataError(f"{path} ends in {suffix!r}; data files are .csv, .jsonl or .parquet.")


def _csv_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, restkey="(beyond the header)", strict=True)
        try:
            for row in reader:
                more = "(beyond the header)" in row
                yield reader.line_num, "has more cells than the header" if more else row
        except csv.Error as error:  # nothing after it can be told apart
            yield reader.line_num, f"is not CSV: {error}; the rest of the file is not read"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            yield number, _json_row(line)


def _json_row(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return row if isinstance(row, dict) else f"is a {type(row).__name__}, not an object"


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    """Read rows; a class label becomes its name, which the file's own metadata holds."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path.name} is a parquet file, and reading one needs the package pyarrow: "
            "pip install pyarrow. Or give the rows as CSV: --set data.path=FILE.csv."
        ) from error
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise DataError(f"{path} is no parquet file: {error}.") from error
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


def _format(
    first: Row | str, data: DataSource, rename: Mapping[str, str], path: Path
) -> DataFormat:
    """Tell the format by the columns; a file with columns of none is read by the recipe's names."""
    columns = set() if isinstance(first, str) else {rename.get(key, key) for key in first}
    shapes: dict[DataFormat, set[str]] = {
        "prompt-completion": {data.prompt, data.completion},
        "messages": {"messages"},
        "alpaca": {"instruction", "output"},
    }
    fitting: list[DataFormat] = [name for name, needed in shapes.items() if needed <= columns]
    if len(fitting) > 1:
        raise DataError(
            f"{path} could be {' or '.join(fitting)} by its columns {', '.join(sorted(columns))}. "
            f'Say which: data.format = "{fitting[0]}".'
        )
    return fitting[0] if fitting else "prompt-completion"


def _columns(row: Row, data: DataSource, system: str, where: str) -> Asked:
    prompt, completion = row.get(data.prompt), row.get(data.completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], system, where)
    turns = (Turn("user", _text(row, data.prompt, where)),)
    return turns, _text(row, data.completion, where)


def _alpaca(row: Row, system: str, where: str) -> Asked:
    """Join instruction and input by a line break; both are what the user says."""
    if row.get("system"):
        _check_system(_text(row, "system", where), system, 0, where)
    if row.get("history"):
        raise BadRow(where, "has a history; give conversations as messages", "columns")
    asked = _text(row, "instruction", where)
    more = _text(row, "input", where) if row.get("input") else ""
    return (Turn("user", f"{asked}\n{more}" if more else asked),), _text(row, "output", where)


def _text(row: Row, column: str, where: str) -> str:
    if column not in row:
        raise BadRow(
            where,
            f"has no column {column!r}, only {', '.join(map(repr, row))}. Name the columns with "
            "data.prompt, data.completion and data.group",
            "columns",
        )
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(where, f"column {column!r} holds {value!r}, not text", "columns")
    return value


def _conversation(messages: Any, system: str, where: str) -> Asked:
    turns: list[Turn] = []
    for number, message in enumerate(messages if isinstance(messages, list) else []):
        role, content = _role_and_content(message, where)
        if role == "system":
            _check_system(content, system, number, where)
        elif role in ("user", "assistant"):
            turns.append(Turn(role, content))
        else:
            raise BadRow(where, f"a message has the role {role!r}", "roles")
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if len(turns) < 2 or len(turns) % 2 or [turn.role for turn in turns] != expected:
        said = ", ".join(turn.role for turn in turns) or "nothing"
        raise BadRow(
            where,
            "messages must alternate user and assistant and end with the assistant's; here: "
            f"{said}",
            "roles",
        )
    return tuple(turns[:-1]), turns[-1].content


def _role_and_content(message: Any, where: str) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(
            where, f"a message needs a role and a content of text, not {message!r}", "roles"
        )
    return role, content


def _check_system(content: str, system: str, number: int, where: str) -> None:
    """Every row is asked under the recipe's system prompt: the version serves only that one."""
    if number != 0 or content != system:
        raise BadRow(
            where,
            f"the system message {content!r} is not the recipe's task.system {system!r}. Take it "
            "out of the rows; the recipe's is put before each",
            "system",
        )


def _default_group(turns: tuple[Turn, ...]) -> str:
    return "\n".join(normalise(turn.content) for turn in turns)
