"""Rows of files as examples: the formats that other tests do not read."""

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

from training.data.files import read_examples
from training.recipe import DataSource


def test_labels_of_a_parquet_file_become_their_names(tmp_path: Path) -> None:
    """The Hub's files hold class numbers; the names are in a note that `datasets` leaves."""
    label = {"_type": "ClassLabel", "names": ["card_arrival", "exchange_rate"]}
    note = {"info": {"features": {"text": {"_type": "Value"}, "label": label}}}
    table = pyarrow.table({"text": ["Where is it?", "What is a pound?"], "label": [0, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    parquet.write_table(table, tmp_path / "train.parquet")
    columns = DataSource(path="train.parquet", prompt="text", completion="category")
    examples = read_examples(tmp_path / "train.parquet", columns, "", {"label": "category"})
    assert [(e.text, e.completion) for e in examples] == [
        ("Where is it?", "card_arrival"),
        ("What is a pound?", "exchange_rate"),
    ]
