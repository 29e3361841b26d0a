"""Rows of files as examples: the formats that other tests do not read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from training.data.examples import Example
from training.data.files import read_rows
from training.errors import BadRow, DataError
from training.recipe import DataFormat, DataSource

FORMATS: tuple[DataFormat, ...] = ("prompt-completion", "messages")


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_of(
    path: Path, data: DataSource | None = None, rename: Mapping[str, str] | None = None
) -> list[Example]:
    rows = list(read_rows(path, data or DataSource(), "", rename or {}))
    assert all(isinstance(row, Example) for row in rows), rows
    return [row for row in rows if isinstance(row, Example)]


def test_labels_of_a_parquet_file_become_their_names(tmp_path: Path) -> None:
    """The Hub's files hold class numbers; the names are in a note that `datasets` leaves."""
    label = {"_type": "ClassLabel", "names": ["card_arrival", "exchange_rate"]}
    note = {"info": {"features": {"text": {"_type": "Value"}, "label": label}}}
    table = pyarrow.table({"text": ["Where is it?", "What is a pound?"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    parquet.write_table(table, tmp_path / "train.parquet")
    columns = DataSource(path="train.parquet", prompt="text", completion="category")
    examples = examples_of(tmp_path / "train.parquet", columns, {"label": "category"})
    assert [(e.text, e.completion) for e in examples] == [
        ("Where is it?", "card_arrival"),
        ("What is a pound?", "exchange_rate"),
    ]


def test_alpaca_rows_are_known_by_their_columns(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Translate.", "input": "Hund", "output": "dog"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
        {"instruction": "Say bye.", "output": "bye"},
    ]
    examples = examples_of(write_rows(tmp_path, rows))
    assert [(e.text, e.completion) for e in examples] == [
        ("Translate.\nHund", "dog"),
        ("Say hello.", "hello"),
        ("Say bye.", "bye"),
    ]
    assert [e.where for e in examples] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]


def test_a_prompt_and_a_completion_may_be_lists_of_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": [*turns, {"role": "user", "content": "c"}], "completion": [turns[1]]}
    (example,) = examples_of(write_rows(tmp_path, [row]))
    assert (example.prompt, example.completion) == ("a\nb\nc", "b")


def test_a_file_that_could_be_two_formats_is_refused_until_one_is_named(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path, [{"messages": chat, "prompt": "c", "completion": "d"}])
    with pytest.raises(DataError, match=r"prompt-completion or messages.*data\.format"):
        examples_of(path)
    found = {form: examples_of(path, DataSource(format=form))[0] for form in FORMATS}
    assert [example.text for example in found.values()] == ["c", "a"]


def test_every_bad_row_is_told_with_its_line_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n"text"\n{"prompt": 1, "completion": "b"}\n\n{\n'
        '{"prompt": "c", "completion": "d"}\n'
    )
    rows = list(read_rows(path, DataSource(), "", {}))
    assert [
        (row.where, row.kind) if isinstance(row, BadRow) else (row.where, row.text) for row in rows
    ] == [
        ("x.jsonl:1", "a"),
        ("x.jsonl:2", "unreadable"),
        ("x.jsonl:3", "columns"),
        ("x.jsonl:5", "unreadable"),
        ("x.jsonl:6", "c"),
    ]


def test_a_file_that_is_no_parquet_and_json_nested_beyond_reading_are_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("prompt,completion\na,b\n")
    with pytest.raises(DataError, match=r"x\.parquet is no parquet file"):
        list(read_rows(tmp_path / "x.parquet", DataSource(), "", {}))
    deep = '{"prompt": ' + "[" * 200_000
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' + deep + "\n")
    _, bad = read_rows(tmp_path / "x.jsonl", DataSource(), "", {})
    assert isinstance(bad, BadRow)
    assert "not JSON" in bad.message


def test_a_csv_that_breaks_off_and_a_file_that_is_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('prompt,completion\na,b\n"c,d\n')
    good, bad = read_rows(tmp_path / "x.csv", DataSource(), "", {})
    assert isinstance(good, Example)
    assert isinstance(bad, BadRow)
    assert "not CSV" in bad.message
    (tmp_path / "y.csv").write_bytes(b"prompt,completion\n\xff\xfe,b\n")
    with pytest.raises(DataError, match="UTF-8"):
        list(read_rows(tmp_path / "y.csv", DataSource(), "", {}))
