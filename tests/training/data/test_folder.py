import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from registry.base import BaseModel
from training.data.folder import write_folder
from training.data.inspection import inspect_data
from training.data.load import load_data
from training.errors import DataError
from training.recipe import Recipe, parse_recipe
from wardrobe import app


def recipe_for(folder: Path, **data: Any) -> Recipe:
    value = {
        "name": "acme/x",
        "base": "local/tiny",
        "data": data,
        "task": {"system": "Answer.", "metric": "exact"},
        "train": {"steps": 1},
    }
    return parse_recipe(value, folder)


def split(source: Recipe, base: BaseModel, out: Path) -> dict[str, Any]:
    inspection, data = inspect_data(source, base.path, lambda _: None)
    assert data is not None
    return write_folder(out, source, base, data, inspection)


def test_the_files_of_a_folder_are_the_sides_they_were_written_from(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    rows = [f"question {'x' * n} number {n},answer {n},group {n // 4}" for n in range(80)]
    (tmp_path / "all.csv").write_text("\n".join(["prompt,completion,about", *rows]))
    source = recipe_for(tmp_path, path="all.csv", group="about", validation=0.2, licence="CC0-1.0")
    card = split(source, tiny_base, tmp_path / "out")
    again = recipe_for(
        tmp_path / "out",
        path="train.jsonl",
        validation_path="validation.jsonl",
        held_out_path="held_out.jsonl",
        group="group",
    )
    one, two = load_data(source), load_data(again)
    for side in ("train", "validation", "held_out"):
        assert sorted(map(repr, (e.prompt for e in getattr(one, side)))) == sorted(
            map(repr, (e.prompt for e in getattr(two, side)))
        )
        assert {e.group for e in getattr(one, side)} == {e.group for e in getattr(two, side)}
    assert two.duplicates == 0

    on_disk = json.loads((tmp_path / "out" / "data.json").read_text())
    assert on_disk == card
    assert (card["licence"], card["data_sha256"]) == ("CC0-1.0", one.digest)
    for name, facts in card["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["rows"] == content.count(b"\n")
    assert str(tmp_path) not in json.dumps(card)
    assert "near_leak" in (tmp_path / "out" / "README.md").read_text()


def test_conversations_survive_a_folder(tmp_path: Path, tiny_base: BaseModel) -> None:
    def chat(name: str) -> dict[str, Any]:
        turns = [("user", name), ("assistant", "b"), ("user", "c ü"), ("assistant", "d")]
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    (tmp_path / "all.jsonl").write_text(
        "".join(json.dumps(chat(name)) + "\n" for name in ("first one", "another"))
    )
    source = recipe_for(tmp_path, path="all.jsonl", held_out=0.5)
    split(source, tiny_base, tmp_path / "out")
    again = recipe_for(tmp_path / "out", path="train.jsonl", held_out_path="held_out.jsonl")
    assert load_data(again).train == load_data(source).train


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path, tiny_base: BaseModel) -> None:
    (tmp_path / "all.csv").write_text("prompt,completion\na one,b\nc two,d\n")
    with pytest.raises(DataError, match="there already"):
        split(recipe_for(tmp_path, path="all.csv"), tiny_base, tmp_path)


def test_a_folder_that_is_there_is_refused_before_the_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'name = "acme/x"\nbase = "local/absent"\n[data]\npath = "absent.csv"\n'
        '[task]\nsystem = "Answer."\nmetric = "exact"\n[train]\nsteps = 1\n'
    )
    done = CliRunner().invoke(app, ["data", "split", str(tmp_path), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "is there already. Name a folder that is not." in done.stderr.replace("\n", " ")
