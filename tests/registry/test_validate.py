"""The gate as a whole: all reasons at once, cards, bases, and what passes with a warning."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.base import BaseModel, Bases
from registry.errors import BaseMismatch, BaseNotFound, Refused
from tests.registry.gate import F32, Adapter, codes, config_of, gate, refused, with_value
from tests.registry.making import BASE_ID, UP, Q, adapter_tensors, key


def test_a_good_adapter_passes_without_a_warning(
    adapter: Adapter, bases: Bases, base: BaseModel, tmp_path: Path
) -> None:
    checked = gate(adapter(), bases, tmp_path)
    assert checked.warnings == ()
    assert checked.rank == 4
    assert checked.base == base
    assert config_of(checked).base_id == BASE_ID


def test_a_file_that_is_wrong_in_very_many_places_is_refused_in_a_short_answer(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(config={f"unknown_{i}": 1 for i in range(20_000)})
    with pytest.raises(Refused, match="There are more problems") as error:
        gate(folder, bases, tmp_path)
    assert len(error.value.message) < 3000
    assert len(error.value.problems) == 101
    assert error.value.problems[-1] == ("not_listed", "There are more problems.")


def test_all_problems_are_told_at_once(adapter: Adapter, bases: Bases, tmp_path: Path) -> None:
    folder = adapter(
        config={"use_qalora": True, "r": 0, "from_the_future": 1},
        tensors=adapter_tensors() | {"stray": np.ones(1, F32)},
        card={"weights": "elsewhere"},
    )
    assert refused(folder, bases, tmp_path) == {
        "card_unknown_field",
        "config_unsupported",
        "rank_invalid",
        "config_unknown_field",
        "unknown_key",
    }


# Cards.


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ({"weights": 1}, "card_unknown_field"),
        ({"base": "acme/tiny-base"}, "card_invalid"),
        ({"base": {"path": "/x"}}, "card_invalid"),
        ({"base": {"id": 7}}, "card_invalid"),
        ({"prompt": {"system": 7}}, "card_invalid"),
        ({"prompt": {"template": "x"}}, "card_invalid"),
        ({"prompt": {"system": "x" * 32_769}}, "card_invalid"),
        ({"gate": {}}, "card_invalid"),
        ({"gate": {"passed": True, "failures": ["no"]}}, "card_invalid"),
        ({"gate": {"passed": False}}, "card_invalid"),
        ({"gate": {"passed": False, "failures": [1]}}, "card_invalid"),
        ({"gate": {"passed": 1, "failures": []}}, "card_invalid"),
        ({"gate": {"passed": False, "failures": "accuracy"}}, "card_invalid"),
        ({"kind": "base"}, "card_invalid"),
        ({"kind": 1}, "card_invalid"),
        ({"metrics": [1]}, "card_invalid"),
    ],
)
def test_a_card_that_is_not_understood_is_refused(
    adapter: Adapter, bases: Bases, tmp_path: Path, card: dict[str, Any], code: str
) -> None:
    assert refused(adapter(card=card), bases, tmp_path) == {code}


# Which base model.


def test_the_base_comes_from_the_caller_the_card_or_the_config(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    local = {"base_model_name_or_path": "/home/me/base"}
    by_card = adapter(config=local, card={"base": {"id": BASE_ID}})
    assert config_of(gate(by_card, bases, tmp_path)).base_id == BASE_ID
    (tmp_path / "caller").mkdir()
    checked = gate(adapter(config=local), bases, tmp_path / "caller", base=BASE_ID)
    assert config_of(checked).to_json()["base_model_name_or_path"] == BASE_ID


def test_a_caller_who_names_another_base_than_the_card_is_told_so(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={"base": {"id": "acme/other"}})
    with pytest.raises(BaseMismatch, match="acme/other"):
        gate(folder, bases, tmp_path, base=BASE_ID)


def test_a_base_that_is_not_here_says_how_to_get_it(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    with pytest.raises(BaseNotFound) as missing:
        gate(adapter(config={"base_model_name_or_path": "acme/absent"}), bases, tmp_path)
    assert "wardrobe base pull acme/absent" in missing.value.command


def test_another_structure_under_the_same_id_is_a_mismatch(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(card={"base": {"id": BASE_ID, "structure": "0" * 64}})
    with pytest.raises(BaseMismatch) as error:
        gate(folder, bases, tmp_path)
    assert codes(error) == {"base_mismatch"}


# What is accepted with a warning.


def warnings_of(folder: Path, bases: Bases, tmp_path: Path) -> list[str]:
    return [code for code, _ in gate(folder, bases, tmp_path).warnings]


def test_other_weights_of_the_same_base_are_a_warning(
    adapter: Adapter, bases: Bases, base: BaseModel, tmp_path: Path
) -> None:
    card = {"base": {"id": BASE_ID, "fingerprint": "0" * 64, "structure": base.structure}}
    assert warnings_of(adapter(card=card), bases, tmp_path) == ["base_weights_differ"]


def test_a_config_that_names_another_base_than_the_pusher_is_a_warning(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    folder = adapter(config={"base_model_name_or_path": "acme/other"})
    [(code, text)] = gate(folder, bases, tmp_path, base=BASE_ID).warnings
    assert (code, "'acme/other'" in text, repr(BASE_ID) in text) == ("base_differs", True, True)


@pytest.mark.parametrize(("named", "said"), [("/models/base", "the folder '/m"), (None, "empty")])
def test_a_base_without_a_name_here_is_refused_with_where_names_are(
    adapter: Adapter, bases: Bases, tmp_path: Path, named: str | None, said: str
) -> None:
    with pytest.raises(Refused, match=rf"is {said}.*wardrobe base list"):
        gate(adapter(config={"base_model_name_or_path": named}), bases, tmp_path)


def test_an_adapter_that_changes_nothing_is_a_warning(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    zeros = {name: t * (".lora_A." in name) for name, t in adapter_tensors().items()}
    assert warnings_of(adapter(tensors=zeros), bases, tmp_path) == ["noop_adapter"]


def test_huge_values_and_mixed_dtypes_are_warnings(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    tensors = with_value(key(Q, "A"), 0, -20_000) | {key(UP, "A"): np.ones((4, 8), np.float16)}
    found = warnings_of(adapter(tensors=tensors), bases, tmp_path)
    assert found == ["suspicious_scale", "mixed_dtypes"]


def test_targeted_modules_without_tensors_are_a_warning(
    adapter: Adapter, bases: Bases, tmp_path: Path
) -> None:
    only_q = {name: t for name, t in adapter_tensors().items() if "q_proj" in name}
    folder = adapter(tensors=only_q, config={"target_modules": ["q_proj"]})
    assert warnings_of(folder, bases, tmp_path) == []
    (tmp_path / "b").mkdir()
    folder = adapter(tensors=only_q, config={"target_modules": "(a+)+$"})
    checked = gate(folder, bases, tmp_path / "b")
    assert [code for code, _ in checked.warnings] == ["targets_written_out"]
    assert config_of(checked).to_json()["target_modules"] == [Q]
