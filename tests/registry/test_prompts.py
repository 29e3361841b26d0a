"""Versions that are a prompt: system text and examples, alone or with an adapter."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.adapter import AdapterName, Selector
from registry.errors import BaseMismatch, Refused
from registry.jsonfile import canonical
from registry.records import Push
from registry.store import Registry
from tests.registry.making import BASE_ID

Adapter = Callable[..., Path]
NAME = AdapterName.parse("acme/support")
SHOTS = [["lost card", "block_card"], ["PIN?", "change_pin"]]


def prompt_card(**parts: Any) -> dict[str, Any]:
    prompt = {"system": "Name the intent.", "examples": SHOTS}
    return {"kind": "prompt", "base": {"id": BASE_ID}, "prompt": prompt} | parts


def write(folder: Path, card: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "wardrobe.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def push(registry: Registry, tmp_path: Path) -> Callable[..., Push]:
    """Return a function that pushes a folder with nothing but this card."""

    def make(card: dict[str, Any], name: AdapterName = NAME) -> Push:
        folder = write(tmp_path / f"prompt-{len(list(tmp_path.iterdir()))}", card)
        return registry.push(folder, name, actor="tester")

    return make


def with_examples(*examples: Any) -> dict[str, Any]:
    return prompt_card(prompt={"system": "Name the intent.", "examples": list(examples)})


def test_a_folder_with_only_a_card_becomes_a_prompt_version(
    registry: Registry, push: Callable[..., Push]
) -> None:
    version = push(prompt_card()).version
    assert (version.kind, version.rank, version.files) == ("prompt", 0, {})
    assert version.examples == (("lost card", "block_card"), ("PIN?", "change_pin"))
    assert version.system_prompt == "Name the intent."
    assert version.size_bytes == len(canonical(prompt_card()["prompt"]))
    assert version.adapter is None
    assert registry.resolve(Selector.parse("acme/support@v1")) == version
    assert registry.verify().ok
    assert not push(prompt_card(metrics={"accuracy": 0.5})).created


@pytest.mark.parametrize(
    "examples",
    [
        [["lost card", "block_card"], ["PIN?", "change_PIN"]],
        [["PIN?", "change_pin"], ["lost card", "block_card"]],
        [["lost card", "block_card"]],
        [["lost card", "block_card"], ["PIN?", "change_pin "]],
        [["lost card\nPIN?", "block_card"], ["PIN?", "change_pin"]],
        [],
    ],
)
def test_every_change_of_an_example_is_another_version(
    push: Callable[..., Push], examples: list[list[str]]
) -> None:
    first, second = push(prompt_card()), push(with_examples(*examples))
    assert second.created
    assert first.version.digest != second.version.digest


def test_versions_without_examples_keep_the_digest_they_always_had(
    registry: Registry, adapter: Adapter
) -> None:
    """The manifest as it was before examples existed, written out."""
    card = {"prompt": {"system": "Answer briefly."}}
    version = registry.push(adapter(card=card), NAME, actor="tester").version
    manifest = {
        "format": 1,
        "kind": "lora",
        "base": {"id": BASE_ID, "fingerprint": ""},
        "config": version.files["adapter_config.json"],
        "weights": version.files["adapter_model.safetensors"],
        "system_prompt": "Answer briefly.",
    }
    assert version.digest == hashlib.sha256(canonical(manifest)).hexdigest()


def test_an_adapter_may_carry_examples_and_is_another_version_with_them(
    registry: Registry, adapter: Adapter
) -> None:
    plain = registry.push(adapter(), NAME, actor="tester").version
    prompt = {"examples": SHOTS}
    both = registry.push(adapter(card={"prompt": prompt}), NAME, actor="tester").version
    assert (both.kind, both.adapter, len(both.examples)) == ("lora", both.ref, 2)
    assert both.digest != plain.digest
    assert both.files == plain.files
    assert (registry.fetch(both.ref) / "adapter_model.safetensors").is_file()


def test_a_pulled_prompt_can_be_pushed_again(
    registry: Registry, push: Callable[..., Push], tmp_path: Path
) -> None:
    first = push(prompt_card()).version
    registry.pull(Selector.parse("acme/support@v1"), tmp_path / "pulled")
    assert [path.name for path in (tmp_path / "pulled").iterdir()] == ["wardrobe.json"]
    again = registry.push(tmp_path / "pulled", NAME, actor="tester")
    assert (again.created, again.version) == (False, first)


def test_there_is_nothing_to_fetch_of_a_prompt(
    registry: Registry, push: Callable[..., Push]
) -> None:
    with pytest.raises(Refused, match="no adapter to load"):
        registry.fetch(push(prompt_card()).version.ref)


def test_prompts_are_promoted_and_rolled_back_like_adapters(
    registry: Registry, push: Callable[..., Push], adapter: Adapter
) -> None:
    registry.push(adapter(), NAME, actor="tester")
    push(prompt_card())
    for number in (1, 2):
        registry.promote(NAME, number, reason="a test", actor="tester")
    assert registry.resolve(Selector.parse("acme/support")).kind == "prompt"
    registry.rollback(NAME, reason="a test", actor="tester")
    assert registry.resolve(Selector.parse("acme/support")).kind == "lora"


def test_an_example_that_was_changed_in_the_database_is_found(
    registry: Registry, push: Callable[..., Push]
) -> None:
    push(prompt_card())
    with sqlite3.connect(registry.home / "registry.sqlite") as database:
        database.execute("UPDATE versions SET card = replace(card, 'block_card', 'give_card')")
    assert any("does not fit its digest" in problem for problem in registry.verify().problems)


@pytest.mark.parametrize(
    ("examples", "word"),
    [
        ("lost card", "list of two texts"),
        ([["lost card"]], "number 1"),
        ([["a", "b"], ["a", "b", "c"]], "number 2"),
        ([["a", 7]], "number 1"),
        ([["a", " "]], "not empty"),
        ([{"user": "a", "assistant": "b"}], "number 1"),
        ([["a", "b"]] * 257, "257 examples"),
        ([["a" * 262_144, "b"]], "262145 characters"),
    ],
)
def test_examples_that_are_none_or_too_many_are_refused(
    push: Callable[..., Push], examples: Any, word: str
) -> None:
    with pytest.raises(Refused, match=word):
        push(prompt_card(prompt={"examples": examples}))


@pytest.mark.parametrize("prompt", [{}, {"system": ""}, {"examples": []}])
def test_a_prompt_version_without_a_prompt_is_refused(
    push: Callable[..., Push], prompt: dict[str, Any]
) -> None:
    with pytest.raises(Refused, match="kind 'prompt' needs"):
        push(prompt_card(prompt=prompt))


def test_files_that_do_not_belong_to_the_kind_are_refused(
    registry: Registry, adapter: Adapter, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as error:
        registry.push(adapter(card=prompt_card()), NAME, actor="tester")
    assert [code for code, _ in error.value.problems] == ["file_unexpected"] * 2
    lora = write(tmp_path / "card-of-an-adapter", prompt_card(kind="lora"))
    with pytest.raises(Refused, match=r"adapter_config\.json is missing"):
        registry.push(lora, NAME, actor="tester")


def test_a_prompt_needs_the_base_it_was_measured_on(push: Callable[..., Push]) -> None:
    with pytest.raises(Refused, match=r"no base\.id"):
        push(prompt_card(base={}))
    with pytest.raises(BaseMismatch):
        push(prompt_card(base={"id": BASE_ID, "structure": "0" * 64}))
