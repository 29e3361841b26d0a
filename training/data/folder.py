"""A data folder: the sides of a recipe's data as files, and the card that says what they are.

train.jsonl  validation.jsonl  held_out.jsonl    {"messages": […], "group": …} a line
data.json                                        the card for programs
README.md                                        the card for people
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from training.data.checks import side_name
from training.data.examples import Data, Example
from training.data.inspection import Inspection
from training.errors import DataError
from training.recipe import Recipe

CARD_FILE = "data.json"


def refuse_folder(out: Path) -> None:
    """Raise DataError when `out` is there already, which is better known before the checks."""
    if out.exists():
        raise DataError(f"{out} is there already. Name a folder that is not.")


def write_folder(
    out: Path, recipe: Recipe, base: BaseModel, data: Data, inspection: Inspection
) -> dict[str, Any]:
    """Write the folder in one rename, and return its card. Raises DataError when it is there."""
    refuse_folder(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files: dict[str, Any] = {}
    for side in ("train", "validation", "held_out"):
        examples: tuple[Example, ...] = getattr(data, side)
        if examples:
            content = jsonl(map(row_of, examples))
            (partial / f"{side}.jsonl").write_bytes(content)
            groups = len({example.group for example in examples})
            digest = hashlib.sha256(content).hexdigest()
            files[f"{side}.jsonl"] = {"rows": len(examples), "groups": groups, "sha256": digest}
    card = _card(recipe, base, data, inspection, files)
    text = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    (partial / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    (partial / "README.md").write_text(_readme(card), encoding="utf-8")
    partial.rename(out)
    return card


def row_of(example: Example) -> dict[str, Any]:
    """Return an example as a row; the system prompt is the recipe's and in none of them."""
    messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
    messages.append({"role": "assistant", "content": example.completion})
    return {"messages": messages, "group": example.group}


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Write rows a line each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _card(
    recipe: Recipe, base: BaseModel, data: Data, inspection: Inspection, files: dict[str, Any]
) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "data_sha256": data.digest,
        "licence": recipe.data.licence,
        "source": _source(recipe),
        "seed": recipe.seed,
        "group": recipe.data.group or "equal prompts, unless a builder says more",
        "labels": list(recipe.data.labels),
        "selection": {
            "near_duplicates": recipe.data.selection.near_duplicates,
            "rows": recipe.data.selection.rows,
            "by": recipe.data.selection.by,
        },
        "system": recipe.task.system,
        "base": {"id": base.id, "fingerprint": base.fingerprint},
        "files": files,
        "left_out_as_repeated": data.duplicates,
        "left_out_as_near": data.near_duplicates,
        "checks": [
            {"code": f.code, "severity": f.severity, "count": f.count, "sentence": f.sentence}
            for f in inspection.findings
        ],
    }


def _source(recipe: Recipe) -> dict[str, Any]:
    """Say where the rows are from, without the paths of this machine."""
    data = recipe.data
    if data.builder is not None:
        return {"builder": data.builder, "options": data.options}
    if data.path is not None:
        names = (data.path, data.validation_path, data.held_out_path)
        paths = [recipe.folder / name for name in names if name]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert data.hub is not None, "the recipe was checked to have a source"
    hub = data.hub
    files = [name for name in (hub.train, hub.validation, hub.held_out) if name]
    return {"hub": hub.repo, "revision": hub.revision, "files": files}


def _readme(card: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {side_name(name.removesuffix('.jsonl'))} | `{name}` | {facts['rows']:,} | "
        f"{facts['groups']:,} | `{facts['sha256']}` |"
        for name, facts in card["files"].items()
    )
    checks = "\n".join(f"- {f['severity']} `{f['code']}`: {f['sentence']}" for f in card["checks"])
    validation = 'validation_path = "validation.jsonl"\n'
    return f"""# Data of {card["name"]}

| side | file | rows | groups | sha256 |
|---|---|---|---|---|
{rows}

- **Licence**: {card["licence"] or "not stated: set data.licence in the recipe"}
- **Source**: `{json.dumps(card["source"], ensure_ascii=False)}`
- **Split**: whole groups ({card["group"]}), seed {card["seed"]}
- **Left out** because another row asks the same: {card["left_out_as_repeated"]}
- **Left out** because another row asks nearly the same: {card["left_out_as_near"]}
- **Selection**: `{json.dumps(card["selection"])}`
- **System prompt**: {card["system"]!r}
- **Lengths and templates checked with**: {card["base"]["id"]}
- **sha256 of the rows of all sides**: `{card["data_sha256"]}`

Checks:

{checks or "- nothing was found"}

To train on it, in a recipe.toml in this folder:

```toml
[data]
path = "train.jsonl"
{validation if "validation.jsonl" in card["files"] else ""}held_out_path = "held_out.jsonl"
group = "group"
```
"""
