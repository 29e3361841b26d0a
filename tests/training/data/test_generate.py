import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from registry.base import BaseModel
from tests.training.data.scripted_endpoint import scripted_endpoint
from training.data import generate as generation
from training.data.duplicates import near_across, near_pairs
from training.data.endpoint import Endpoint
from training.data.examples import Data, ask, digest_examples
from training.data.generate import Filter, Generated, generate
from training.data.journal import Journal
from training.data.load import load_data
from training.data.proposals import (
    PARAPHRASE,
    Proposal,
    Propose,
    by_paraphrase,
    by_self_instruct,
    from_templates,
)
from training.data.templates import load_templates
from training.errors import DataError, EndpointFailed
from training.prompt import load_prompter
from training.recipe import Recipe, parse_recipe

WORDS = ("river", "castle", "violin", "tomato", "glacier", "lantern", "bicycle", "harbour")
TRAIN = tuple(ask(f"tell me of the {word}", "noun", f"group {word}") for word in WORDS)
HELD_OUT = (ask("an orchard in the morning sun", "noun", "orchard"),)
DATA = Data(TRAIN, HELD_OUT, 0, digest_examples(TRAIN, HELD_OUT))


def recipe_for(metric: str = "label", folder: Path = Path()) -> Recipe:
    value = {
        "name": "acme/x",
        "base": "local/tiny",
        "data": {"path": "unused.csv"},
        "task": {"system": "Sort.", "metric": metric},
        "train": {"steps": 1, "max_length": 120},
    }
    return parse_recipe(value, folder)


def run(
    out: Path, wanted: int, propose: Propose, base: BaseModel, near: float = 0.6, **facts: Any
) -> Generated:
    recipe = recipe_for()
    accept = Filter(recipe, DATA, load_prompter(base.path, recipe.task.system), near)
    return generate(Journal(out, facts or {"how": "test"}), wanted, propose, accept, lambda _: None)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts_of(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in rows_of(path)]


def reword(system: str, user: str, seed: int) -> str:
    """Say something of its own for each seed, and every kind of rubbish in between."""
    rubbish = [
        user.upper(),
        "",
        "An orchard in the morning sun!",
        "stop<|im_end|>here",
        "long " * 40,
        f"{user}s",
        "a quite different question that was cut o…",
    ]
    number = seed * 2654435761 % 2**32
    return rubbish[seed % 14] if seed % 14 < 7 else f"{number:x} {user.split()[-1]} {number:b}"


def test_paraphrases_pass_the_checks_and_say_where_they_are_from(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    out = tmp_path / "new.jsonl"
    with scripted_endpoint(reword) as server:
        endpoint = Endpoint(server.url, "secret", "base", 0.5)
        made = run(out, 20, by_paraphrase(TRAIN, endpoint, seed=0), tiny_base)
    assert (made.accepted, made.complete) == (20, True)
    rejected = {"no_example", "duplicate", "empty_prompt", "near_leak", "control_token", "too_long"}
    assert rejected | {"near_duplicate"} == set(made.rejected)
    assert sum(made.rejected.values()) == len(rows_of(tmp_path / "new.jsonl.rejected"))

    prompts = prompts_of(out)
    assert near_across(prompts, [e.prompt for e in (*TRAIN, *HELD_OUT)]) == []
    assert near_pairs(prompts) == []
    groups = {example.prompt: example.group for example in TRAIN}
    for row in rows_of(out):
        assert row["group"] == groups[row["made"]["from"][0]]
        assert row["messages"][1]["content"] == "noun"
    asked = {body["messages"][1]["content"] for body in server.history}
    assert asked <= set(groups)
    assert server.history[0]["messages"][0]["content"] == PARAPHRASE
    assert len({body["seed"] for body in server.history}) == len(server.history)
    assert server.keys == {"Bearer secret"}


def test_an_interrupted_generation_goes_on_and_ends_with_the_same_rows(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    def failing(system: str, user: str, seed: int) -> str | None:
        return None if seed == 19 else reword(system, user, seed)

    with scripted_endpoint(reword) as server:
        propose = by_paraphrase(TRAIN, Endpoint(server.url, "k", "base", 0.5), seed=0)
        run(tmp_path / "whole.jsonl", 15, propose, tiny_base)
        server.script = failing
        with pytest.raises(EndpointFailed, match=r"scripted refusal.*same command"):
            run(tmp_path / "broken.jsonl", 15, propose, tiny_base)
        before = (tmp_path / "broken.jsonl").read_bytes()
        assert before.count(b"\n") == 7
        (tmp_path / "broken.jsonl").write_bytes(before[:-7])  # a crash in the middle of a line
        server.script = reword
        run(tmp_path / "broken.jsonl", 15, propose, tiny_base)
    whole, broken = (rows_of(tmp_path / f"{name}.jsonl") for name in ("whole", "broken"))
    assert sorted(map(json.dumps, whole)) == sorted(map(json.dumps, broken))


def test_ctrl_c_does_not_wait_for_a_model_that_takes_its_time(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    out, over = tmp_path / "new.jsonl", threading.Event()
    waited: list[int] = []

    def thinking(system: str, user: str, seed: int) -> str:
        if seed == 19:
            signal.raise_signal(signal.SIGINT)
            over.wait(20)
            waited.append(seed)
        return reword(system, user, seed)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with scripted_endpoint(thinking) as server:
            propose = by_paraphrase(TRAIN, Endpoint(server.url, "k", "base", 0.5), seed=0)
            with pytest.raises(KeyboardInterrupt):
                run(out, 15, propose, tiny_base)
            assert waited == []
            assert len(rows_of(out)) == 7
            over.set()
            server.script = reword
            assert run(out, 15, propose, tiny_base).accepted == 15
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_made_in_another_way_is_not_gone_on_with(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    out = tmp_path / "new.jsonl"
    with scripted_endpoint(reword) as server:
        propose = by_paraphrase(TRAIN, Endpoint(server.url, "k", "base", 0.5), seed=0)
        run(out, 3, propose, tiny_base, how="paraphrase", model="base")
        with pytest.raises(DataError, match="model = 'base', not 'other'"):
            run(out, 6, propose, tiny_base, how="paraphrase", model="other")
        assert run(out, 6, propose, tiny_base, how="paraphrase", model="base").accepted == 6


def test_self_instruct_reads_request_and_answer_and_refuses_unknown_labels(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    def say(system: str, user: str, seed: int) -> str:
        assert "Sort." in system
        assert user.count("Request: tell me of the") == 4
        label = "noun" if seed % 3 else "verb"
        return (
            "no form"
            if seed % 4 == 0
            else f"Request: {seed * 2654435761 % 2**32:x}\nAnswer: {label}\n"
        )

    with scripted_endpoint(say) as server:
        propose = by_self_instruct(
            TRAIN, Endpoint(server.url, "k", "base", 0.5), recipe_for().task, seed=0
        )
        made = run(tmp_path / "new.jsonl", 5, propose, tiny_base, near=1.0)
    assert made.accepted == 5
    assert set(made.rejected) == {"no_example", "no_answer"}
    assert {row["messages"][1]["content"] for row in rows_of(tmp_path / "new.jsonl")} == {"noun"}
    assert all(len(row["made"]["from"]) == 4 for row in rows_of(tmp_path / "new.jsonl"))


def test_templates_fill_prompt_and_answer_alike_and_group_by_wording(
    tmp_path: Path, tiny_base: BaseModel
) -> None:
    path = tmp_path / "light.toml"
    path.write_text(
        '[slots]\nroom = ["kitchen", "attic", "cellar"]\nway = ["on", "off"]\n'
        "[[templates]]\n"
        'prompts = ["turn {way} the light in the {room}", "light {way} in the {room}"]\n'
        'completion = \'{"room":"{room}","state":"{way}"}\'\n'
    )
    propose = from_templates(load_templates(path), seed=0)
    accept = Filter(recipe_for("json"), DATA, load_prompter(tiny_base.path, "Sort."), 1.0)
    journal = Journal(tmp_path / "new.jsonl", {"how": "templates"})
    made = generate(journal, 12, propose, accept, lambda _: None)
    assert (made.accepted, made.complete) == (12, True)  # every one there is: 2 × 3 × 2
    for row in rows_of(tmp_path / "new.jsonl"):
        asked, answer = row["messages"][0]["content"], json.loads(row["messages"][1]["content"])
        wording = row["group"].replace("{room}", answer["room"]).replace("{way}", answer["state"])
        assert wording == asked
    # and training reads the file as it is
    (tmp_path / "held_out.jsonl").write_text((tmp_path / "new.jsonl").read_text())
    recipe = parse_recipe(
        {
            "name": "a/b",
            "base": "local/tiny",
            "data": {"path": "new.jsonl", "group": "group", "held_out": 0.5},
            "task": {"system": "Sort.", "metric": "json"},
            "train": {"steps": 1},
        },
        tmp_path,
    )
    assert len(load_data(recipe).train) == 6


def test_generation_ends_when_nothing_new_comes(
    tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "GIVE_UP", 30)
    always = Proposal(ask("the one and only", "noun", "g"), ("x",), "raw")
    made = run(tmp_path / "n.jsonl", 5, lambda attempts: [always for _ in attempts], tiny_base)
    assert (made.accepted, made.complete) == (1, False)
    assert set(made.rejected) == {"duplicate"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[slots]\n", "templates"),
        ('[slots]\n[[templates]]\nprompts = ["{who}"]\ncompletion = "x"\n', "{who}"),
        ('[slots]\n[[templates]]\nprompts = []\ncompletion = "x"\n', "length"),
        ("[slots", "no file of templates"),
    ],
)
def test_a_wrong_template_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.toml").write_text(content)
    with pytest.raises(DataError) as refusal:
        load_templates(tmp_path / "t.toml")
    assert words in refusal.value.message


def test_an_endpoint_that_is_no_url_is_refused_without_asking() -> None:
    endpoint = Endpoint("127.0.0.1:8000/v1", "none", "base", 0.8)
    with pytest.raises(EndpointFailed, match="no http:// or https:// URL"):
        endpoint.ask([])
