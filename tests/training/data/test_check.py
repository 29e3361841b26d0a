"""Planted faults: each is found, named, and pointed at by its line; sound data has no findings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from registry.base import BaseModel
from tests.tiny import CHATML
from tests.training.test_prompt import wearing
from training.data.checks import Finding, check_examples_in_prompt
from training.data.examples import Data, ask
from training.data.inspection import Inspection, histogram, inspect_data
from training.recipe import parse_recipe

NOUNS = (
    "river", "castle", "violin", "tomato", "glacier", "lantern", "bicycle", "harbour", "puzzle",
    "thunder", "orchard", "blanket", "compass", "dolphin", "emerald", "feather", "giraffe",
    "hammock", "iceberg", "jasmine",
)  # fmt: skip
REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
SOUND = [(f"{noun} or not {noun[::-1]}", f"answer {n}") for n, noun in enumerate(NOUNS)]


def write_csv(
    path: Path, rows: Sequence[tuple[str, ...]], header: str = "prompt,completion"
) -> None:
    lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n")


def check(folder: Path, base: Path, **changes: Any) -> Inspection:
    tables: dict[str, Any] = {
        "name": "acme/x",
        "base": "local/tiny",
        "data": {"path": "train.csv"} | changes.pop("data", {}),
        "task": {"system": "Answer.", "metric": "exact"} | changes.pop("task", {}),
        "train": {"steps": 1} | changes,
    }
    inspection, _ = inspect_data(parse_recipe(tables, folder), base, lambda _: None)
    return inspection


def found(inspection: Inspection, code: str) -> Finding:
    matching = [finding for finding in inspection.findings if finding.code == code]
    assert len(matching) == 1, inspection.findings
    return matching[0]


def test_sound_data_has_no_findings(tmp_path: Path, tiny_base: BaseModel) -> None:
    write_csv(tmp_path / "train.csv", SOUND)
    inspection = check(tmp_path, tiny_base.path, data={"validation": 0.2})
    assert inspection.findings == ()
    assert inspection.rows == {"train": 13, "validation": 3, "held_out": 4}
    assert inspection.digest is not None


@pytest.mark.parametrize(
    ("row", "code", "severity", "line"),
    [
        (("a question", ""), "empty_completion", "error", "train.csv:22"),
        (("  ", "an answer"), "empty_prompt", "error", "train.csv:22"),
        (("long " * 60, "an answer"), "too_long", "error", "train.csv:22"),
        (("a question", "yes<|im_end|> and no"), "stop_token", "error", "train.csv:22"),
        (("a <|im_start|>system", "yes"), "control_token", "warning", "train.csv:22"),
        ((SOUND[3][0].upper(), SOUND[3][1]), "duplicate", "warning", "train.csv:22"),
        ((SOUND[3][0], "something else"), "contradiction", "warning", "train.csv:22"),
        ((SOUND[3][0] + "s", "an answer"), "near", "warning", ""),
    ],
)
def test_a_planted_row_is_found_and_named(
    tmp_path: Path,
    tiny_base: BaseModel,
    row: tuple[str, str],
    code: str,
    severity: str,
    line: str,
) -> None:
    write_csv(tmp_path / "train.csv", [*SOUND, row])
    write_csv(tmp_path / "held_out.csv", [("quite another thing", "an answer")])
    inspection = check(tmp_path, tiny_base.path, data={"held_out_path": "held_out.csv"})
    finding = found(inspection, "near_duplicate" if code == "near" else code)
    assert (finding.severity, finding.count) == (severity, 1)
    assert line in finding.rows[0]
    assert inspection.errors == (severity == "error")


def test_a_planted_leak_is_found_exact_and_near(tmp_path: Path, tiny_base: BaseModel) -> None:
    write_csv(tmp_path / "train.csv", SOUND)
    held_out = [(SOUND[7][0].title(), "x"), (f"{SOUND[9][0]}s", "x"), ("a clean question", "x")]
    write_csv(tmp_path / "held_out.csv", held_out)
    inspection = check(tmp_path, tiny_base.path, data={"held_out_path": "held_out.csv"})
    leak = found(inspection, "leak")
    assert leak.count == 1
    assert "train.csv:9" in leak.rows[0]
    assert "held_out.csv:2" in leak.rows[0]
    near = found(inspection, "near_leak")
    assert "1 of 3 held-out rows" in near.sentence
    assert "held_out.csv:3" in near.rows[0]
    assert "train.csv:11" in near.rows[0]


def test_a_group_on_two_sides_is_an_error(tmp_path: Path, tiny_base: BaseModel) -> None:
    columns = "prompt,completion,ticket"
    write_csv(tmp_path / "train.csv", [(*row, f"t{n}") for n, row in enumerate(SOUND)], columns)
    write_csv(tmp_path / "held_out.csv", [("a clean question", "x", "t4")], columns)
    keys = {"held_out_path": "held_out.csv", "group": "ticket"}
    finding = found(check(tmp_path, tiny_base.path, data=keys), "group_leak")
    assert (finding.severity, finding.rows) == ("error", ("'t4'",))


def test_an_example_in_the_prompt_that_is_held_out_is_found() -> None:
    data = Data((), (ask("where is my card?", "arrival", "1"),), 0, "")
    near = [ask("where is my new card?", "arrival", "2"), ask("what is a pound?", "rate", "3")]
    (finding,) = check_examples_in_prompt(near, data)
    assert (finding.code, finding.severity, finding.count) == ("prompt_leak", "error", 1)
    assert list(check_examples_in_prompt(near[1:], data)) == []


def test_every_bad_row_of_a_file_is_listed(tmp_path: Path, tiny_base: BaseModel) -> None:
    chat = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]
    rows: list[Any] = [{"messages": chat}, 7, {"messages": chat[::-1]}, {"messages": chat[:1]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inspection = check(tmp_path, tiny_base.path, data={"path": "train.jsonl"})
    assert found(inspection, "roles").count == 2
    assert "train.jsonl:4" in found(inspection, "roles").rows[1]
    assert "train.jsonl:2" in found(inspection, "unreadable").rows[0]
    assert "1 examples leave 0 to train on" in found(inspection, "split").sentence


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            CHATML.replace("%}<", "%}{% if message['role'] != 'system' %}<", 1).replace(
                "{% endfor", "{% endif %}{% endfor"
            ),
            "leaves out the system prompt",
        ),
        (CHATML.replace("message['role']", "'assistant'"), "does not tell the user's turns"),
        (CHATML.replace("assistant\n{%", "ASSISTANT\n{%"), "once it is answered"),
        (REFUSING, "no system role"),
        (CHATML.replace("<|im_end|>", "<|end|>"), "none of the stop tokens"),
        ("", "no chat template"),
    ],
)
def test_a_wrong_template_is_named(
    tmp_path: Path, tiny_base: BaseModel, template: str, words: str
) -> None:
    write_csv(tmp_path / "train.csv", SOUND)
    base = wearing(tiny_base.path, tmp_path / "base", template)
    finding = found(check(tmp_path, base), "template")
    assert finding.severity == "error"
    assert words in finding.sentence


def test_a_template_that_wants_turns_in_order_is_not_wrong(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    write_csv(tmp_path / "train.csv", SOUND)
    in_order = (
        "{% if messages[0]['role'] == 'assistant' %}"
        "{{ raise_exception('the user speaks first') }}{% endif %}"
    )
    base = wearing(tiny_base.path, tmp_path / "base", in_order + CHATML)
    assert not [f for f in check(tmp_path, base).findings if f.code == "template"]


def test_rows_that_the_template_changes_are_named(tmp_path: Path, tiny_base: BaseModel) -> None:
    write_csv(tmp_path / "train.csv", [*SOUND, (" indented question", "x")])
    template = CHATML.replace("message['content']", "message['content'] | trim")
    base = wearing(tiny_base.path, tmp_path / "base", template)
    assert "train.csv:22" in found(check(tmp_path, base), "template").rows[0]


def test_labels_that_training_lacks_or_hardly_has_are_named(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    labels = ["common"] * 18 + ["rare"] * 2
    rows = [(prompt, label) for (prompt, _), label in zip(SOUND, labels, strict=True)]
    write_csv(tmp_path / "train.csv", [*rows[:-1]])
    write_csv(tmp_path / "held_out.csv", [("a clean question", "unheard")])
    keys = {"held_out_path": "held_out.csv"}
    inspection = check(tmp_path, tiny_base.path, data=keys, task={"metric": "label"})
    assert "held_out.csv:2" in found(inspection, "unseen_label").rows[0]
    assert "'common' has 18" in found(inspection, "imbalance").sentence
    assert inspection.labels["train"] == {"common": 18, "rare": 1}


def test_a_dropped_long_row_is_a_warning(tmp_path: Path, tiny_base: BaseModel) -> None:
    write_csv(tmp_path / "train.csv", [*SOUND, ("long " * 60, "an answer")])
    write_csv(tmp_path / "held_out.csv", [("long and winding " * 30, "an answer")])
    keys = {"held_out_path": "held_out.csv"}
    finding = found(check(tmp_path, tiny_base.path, data=keys, too_long="drop"), "too_long")
    assert (finding.severity, finding.count) == ("warning", 1)


def test_a_histogram_counts_everything_once() -> None:
    counts = [3, 3, 4, 17, 50]
    found = histogram(counts)
    assert found is not None
    assert (sum(found.counts), found.median, found.most) == (5, 4, 50)
    assert (found.edges, found.counts) == ((3, 9, 15, 21, 27, 33, 39, 45), (3, 0, 1, 0, 0, 0, 0, 1))
    assert histogram([7, 7]) == type(found)((7,), (2,), 7, 7)
    assert histogram([]) is None


def test_the_command_exits_with_1_on_errors_and_on_warnings_if_told_so(
    tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wardrobe import app

    monkeypatch.setenv("WARDROBE_CACHE", str(tiny_base.path.parents[1]))
    (tmp_path / "recipe.toml").write_text(
        'name = "acme/x"\nbase = "local/tiny"\n[data]\npath = "train.csv"\n'
        '[task]\nsystem = "Answer."\nmetric = "exact"\n[train]\nsteps = 1\n'
    )

    def run(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["data", "check", str(tmp_path), *options])
        return done.exit_code, done.stdout

    write_csv(tmp_path / "train.csv", SOUND)
    assert run("--strict")[0] == 0
    write_csv(tmp_path / "train.csv", [*SOUND, SOUND[0]])
    assert run()[0] == 0
    assert run("--strict")[0] == 1
    write_csv(tmp_path / "train.csv", [*SOUND, ("a question", "")])
    status, said = run()
    assert status == 1
    assert "empty_completion" in said
    assert "train.csv:22" in said
    status, said = run("--json")
    assert status == 1
    assert [finding["code"] for finding in json.loads(said)["findings"]] == ["empty_completion"]

    write_csv(tmp_path / "train.csv", SOUND)
    write_csv(tmp_path / "held_out.csv", [("a clean question", "x")])
    card = {"kind": "prompt", "prompt": {"examples": [["A clean question!", "x"]]}}
    (tmp_path / "wardrobe.json").write_text(json.dumps(card))
    held_out = ["--set", f"data.held_out_path={tmp_path / 'held_out.csv'}"]
    assert run(*held_out)[0] == 0
    status, said = run(*held_out, "--card", str(tmp_path / "wardrobe.json"))
    assert status == 1
    assert "prompt_leak" in said
