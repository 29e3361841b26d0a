import json
from pathlib import Path
from typing import Any

import pytest
from hassil import recognize_all
from hassil.intents import Intents, SlotList, TextSlotList

from training.data.builders import home_assistant as home
from training.data.examples import ask
from training.data.load import load_data, split_by_group
from training.errors import DataError, RecipeError
from training.recipe import Recipe, apply_overrides, load_recipe, parse_recipe

ADAPTERS = Path(__file__).parents[3] / "adapters"
RECIPES = sorted(path.parent.name for path in ADAPTERS.glob("*/recipe.toml"))
SYSTEM = "Sort the question."


def recipe_for(folder: Path, **data: Any) -> Recipe:
    value = {
        "name": "acme/sort",
        "base": "local/tiny",
        "data": data,
        "task": {"system": SYSTEM, "metric": "label"},
        "train": {"steps": 1},
    }
    return parse_recipe(value, folder)


def banking_csv(folder: Path) -> Path:
    rows = [f"How do I do thing {number}?,label_{number % 4}" for number in range(60)]
    path = folder / "banking.csv"
    path.write_text("\n".join(["text,category", *rows]) + "\n")
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_builds_its_data_with_no_group_on_both_sides(
    name: str, tmp_path: Path
) -> None:
    assert (ADAPTERS / name / "README.md").is_file()
    recipe = load_recipe(ADAPTERS / name)
    if recipe.data.hub is not None:  # the Hub's rows, given as a file
        recipe = apply_overrides(recipe, [f"data.path={banking_csv(tmp_path)}"])
    data = load_data(recipe)
    assert {e.group for e in data.train}.isdisjoint({e.group for e in data.held_out})
    assert {e.text for e in data.train}.isdisjoint({e.text for e in data.held_out})
    assert min(len(data.train), len(data.held_out)) >= 10
    assert load_data(recipe).digest == data.digest


def test_there_are_recipes_to_test() -> None:
    assert {"smart-home", "icd-10", "banking77"} <= set(RECIPES)


def test_a_split_moves_whole_groups_and_depends_on_the_seed() -> None:
    examples = [ask(f"question {n}", "a", f"group {n // 5}") for n in range(100)]
    train, held_out = split_by_group(examples, 0.2, seed=0)
    assert len(held_out) == 20
    assert {e.group for e in train}.isdisjoint({e.group for e in held_out})
    assert split_by_group(examples, 0.2, seed=0)[1] == held_out
    assert split_by_group(examples, 0.2, seed=1)[1] != held_out
    assert split_by_group(examples[::-1], 0.2, seed=0)[1] == held_out[::-1]


def test_validation_takes_whole_groups_from_the_training_side_only(tmp_path: Path) -> None:
    rows = [f"question number {n},a,group {n // 5}" for n in range(200)]
    (tmp_path / "x.csv").write_text("\n".join(["prompt,completion,group", *rows]))
    keys: dict[str, Any] = {"path": "x.csv", "group": "group", "held_out": 0.25}
    without = load_data(recipe_for(tmp_path, **keys))
    data = load_data(recipe_for(tmp_path, **keys, validation=0.2))
    assert (len(without.train), len(without.validation)) == (150, 0)
    assert (len(data.train), len(data.validation), len(data.held_out)) == (120, 30, 50)
    assert data.held_out == without.held_out
    groups = [{e.group for e in side} for side in (data.train, data.validation, data.held_out)]
    assert len(set.union(*groups)) == sum(len(side) for side in groups)
    assert data.digest != without.digest


def test_a_validation_file_wins_over_a_share_and_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nfirst,x\nsecond,y\nthird,z\n")
    (tmp_path / "b.csv").write_text("prompt,completion\nSecond,y\nthird,z\n")
    (tmp_path / "c.csv").write_text("prompt,completion\nthird ,z\n")
    files = {"path": "a.csv", "validation_path": "b.csv", "held_out_path": "c.csv"}
    data = load_data(recipe_for(tmp_path, **files, validation=0.9))
    assert [e.text for e in data.train] == ["first"]
    assert [e.text for e in data.validation] == ["Second"]
    assert [e.text for e in data.held_out] == ["third "]
    assert data.duplicates == 2


def test_rows_near_another_or_near_what_is_judged_are_counted_when_they_are_left_out(
    tmp_path: Path,
) -> None:
    rows = ["turn on the lamp", "turn on the lamp!", "who wrote Faust", "open a window"]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *(f"{r},x" for r in rows)]))
    (tmp_path / "b.csv").write_text("prompt,completion\nwho wrote Faust?,x\n")
    files = {"path": "a.csv", "held_out_path": "b.csv"}
    data = load_data(recipe_for(tmp_path, **files, selection={"near_duplicates": 0.6}))
    assert sorted(e.text for e in data.train) == ["open a window", "turn on the lamp"]
    assert (data.duplicates, data.near_duplicates) == (0, 2)
    assert load_data(recipe_for(tmp_path, **files)).near_duplicates == 0


def test_only_rows_with_a_named_label_are_kept(tmp_path: Path) -> None:
    columns = {"path": banking_csv(tmp_path).name, "prompt": "text", "completion": "category"}
    data = load_data(recipe_for(tmp_path, **columns, labels=["label_1", "label_3"]))
    assert {e.completion for e in (*data.train, *data.held_out)} == {"label_1", "label_3"}
    assert len(data.train) + len(data.held_out) == 30
    with pytest.raises(DataError, match="label_9"):
        load_data(recipe_for(tmp_path, **columns, labels=["label_1", "label_9"]))


def test_a_text_that_is_held_out_is_not_trained_on_in_another_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nHello  there,x\nOnly here,y\nOnly HERE,z\n")
    (tmp_path / "b.csv").write_text("prompt,completion\nhello there,x\n")
    data = load_data(recipe_for(tmp_path, path="a.csv", held_out_path="b.csv"))
    assert [(e.text, e.completion) for e in data.train] == [("Only here", "y")]
    assert data.duplicates == 2


def test_the_digest_changes_with_one_letter(tmp_path: Path) -> None:
    path = banking_csv(tmp_path)
    recipe = recipe_for(tmp_path, path=path.name, prompt="text", completion="category")
    before = load_data(recipe).digest
    path.write_text(path.read_text().replace("thing 7?", "thing 7!"))
    assert load_data(recipe).digest != before


def test_jsonl_and_messages_give_the_same_examples(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": f"a {n}"} for n in range(10)]
    chats = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    for name, lines in (("rows", rows), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert load_data(recipe_for(tmp_path, path="rows.jsonl")) == load_data(
        recipe_for(tmp_path, path="chats.jsonl")
    )


def test_every_earlier_turn_of_a_conversation_is_in_its_example(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [[*turns[:-1], ("assistant", f"d{n}")] for n in range(2)]
    rows[1][0] = ("user", "other")
    text = "".join(
        json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows
    )
    (tmp_path / "x.jsonl").write_text(text)
    data = load_data(recipe_for(tmp_path, path="x.jsonl", held_out=0.5))
    for example in (*data.train, *data.held_out):
        assert [turn.role for turn in example.turns] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", "question,completion\na,b\n", ["x.csv:2", "'prompt'", "'question'"]),
        ("x.csv", "prompt,completion\na,b,c\n", ["x.csv:2", "more cells"]),
        ("x.csv", "prompt,completion\na\n", ["x.csv:2", "None"]),
        ("x.csv", "prompt,completion\n", ["no rows"]),
        ("x.csv", "prompt,completion\na,\nb,c\n", ["empty"]),
        ("x.jsonl", '{"prompt": "a", "completion": 1}\n', ["x.jsonl:1", "1", "not text"]),
        ("x.jsonl", "[1]\n", ["x.jsonl:1", "list"]),
        ("x.jsonl", "{\n", ["x.jsonl:1", "not JSON"]),
        ("x.jsonl", '{"messages": []}\n', ["alternate"]),
        ("x.jsonl", '{"messages": [{"role": "user"}]}\n', ["role and a content"]),
        (
            "x.jsonl",
            '{"messages": [{"role": "system", "content": "Other."}]}\n',
            ["Other.", SYSTEM],
        ),
        ("x.txt", "a", [".txt", ".jsonl"]),
        ("x.csv", "prompt,completion\nsame,a\nSame,b\n", ["held out"]),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refusal:
        load_data(recipe_for(tmp_path, path=name))
    assert [word for word in words if word not in refusal.value.message] == []


def test_a_missing_file_and_an_unknown_builder_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--set data\.path=FILE"):
        load_data(recipe_for(tmp_path, path="gone.csv"))
    with pytest.raises(RecipeError, match="home-assistant-intents"):
        load_data(recipe_for(tmp_path, builder="imagenet"))
    with pytest.raises(RecipeError, match="codes_per_category"):
        load_data(recipe_for(tmp_path, builder="icd-10-chapters", options={"codes": 1}))
    options = {"intents": ["Dance"]}
    with pytest.raises(RecipeError, match="HassTurnOn"):
        load_data(recipe_for(tmp_path, builder="home-assistant-intents", options=options))


def test_smart_home_sentences_mean_to_home_assistants_own_parser_what_their_json_says() -> None:
    """The oracle is hassil's recogniser over the same templates: it is not what draws them."""
    options = home.HomeAssistantOptions(
        intents=("HassLightSet", "HassTurnOn", "HassSetVolumeRelative"), sentences_per_template=1
    )
    intents = Intents.from_dict(
        json.loads((home.resources.files(home.PACKAGE) / "data" / "en.json").read_text())
    )
    lists = {"area": home.AREAS, "floor": home.FLOORS, "name": home._names(None)}
    slot_lists: dict[str, SlotList] = {
        key: TextSlotList.from_strings(values) for key, values in lists.items()
    }
    examples = home.build_home_assistant(options, seed=3)[::6]
    assert len(examples) >= 15
    for example in examples:
        wanted = json.loads(example.completion)
        name = wanted["slots"].get("name")
        domains = [d for d, names in home.NAMES.items() if name in names] or ["light"]
        found = [
            (result.intent.name, {key: entity.value for key, entity in result.entities.items()})
            for domain in domains
            for result in recognize_all(
                example.text,
                intents,
                slot_lists=slot_lists,
                intent_context={"area": "here", "domain": domain},
                language="en",
            )
        ]
        assert any(
            intent == wanted["intent"] and wanted["slots"].items() <= slots.items()
            for intent, slots in found
        ), (example.text, wanted, found)
