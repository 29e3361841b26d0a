"""A full fine-tune as a version of its own: taken whole, given back whole, never worn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from registry.adapter import AdapterName, Selector
from registry.base import BaseModel
from registry.errors import BaseMismatch, Refused
from registry.store import Registry
from tests.registry.making import UP, Weights, make_whole

NAME = AdapterName.parse("acme/whole")
MODEL = "model.safetensors"


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: w for key, w in weights.items() if key != name}


def replaced(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {f"{UP}.weight": make(weights[f"{UP}.weight"])}


def poisoned(weight: np.ndarray) -> np.ndarray:
    weight[3, 5] = np.nan
    return weight


def test_a_whole_model_is_a_version_that_comes_back_as_a_model_folder(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    folder = make_whole(tmp_path / "made", base)
    pushed = registry.push(folder, NAME, actor="me")
    version = pushed.version
    assert (pushed.created, version.kind, version.rank) == (True, "full", 0)
    assert version.is_whole
    assert list(version.files) == [MODEL], "the base's own files are not stored again"
    assert version.size_bytes == (folder / MODEL).stat().st_size
    registry.pull(Selector(NAME, number=1), tmp_path / "pulled")
    for path in folder.iterdir():
        if path.name != "wardrobe.json":
            assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    again = registry.push(tmp_path / "pulled", NAME, actor="me")
    assert (again.created, again.version.digest) == (False, version.digest)
    assert registry.verify().ok


def test_other_weights_are_another_version(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    first = registry.push(make_whole(tmp_path / "a", base), NAME, actor="me")
    other = make_whole(tmp_path / "b", base, replaced(lambda weight: weight * 2))
    second = registry.push(other, NAME, actor="me")
    assert (second.created, second.version.number) == (True, 2)
    assert second.version.digest != first.version.digest


@pytest.mark.parametrize(
    ("change", "code", "kind"),
    [
        (without(f"{UP}.weight"), "tensor_missing", Refused),
        (
            lambda weights: weights | {"extra": np.zeros(2, "f4")},
            "module_not_in_base",
            BaseMismatch,
        ),
        (replaced(lambda weight: weight[:, :4].copy()), "shape_mismatch", BaseMismatch),
        (replaced(lambda weight: weight.astype("f2")), "dtype_unsupported", Refused),
        (replaced(poisoned), "non_finite", Refused),
    ],
)
def test_a_model_that_is_no_fine_tune_of_the_base_is_refused(
    change: Callable[[Weights], Weights],
    code: str,
    kind: type[Refused],
    registry: Registry,
    base: BaseModel,
    tmp_path: Path,
) -> None:
    folder = make_whole(tmp_path / "made", base, change)
    with pytest.raises(kind) as refusal:
        registry.push(folder, NAME, actor="me")
    assert [found for found, _ in refusal.value.problems] == [code]


def test_a_configuration_that_is_not_the_bases_is_refused(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    folder = make_whole(tmp_path / "made", base)
    (folder / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(Refused, match=r"config\.json is not the file of"):
        registry.push(folder, NAME, actor="me")


def test_only_the_kind_full_may_be_whole(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(Refused) as refusal:
        registry.push(make_whole(tmp_path / "made", base, kind="lora"), NAME, actor="me")
    assert "file_unexpected" in {code for code, _ in refusal.value.problems}


def test_an_adapter_brings_no_file_of_the_base(
    registry: Registry, adapter: Callable[..., Path]
) -> None:
    folder = adapter()
    (folder / "config.json").write_text("{}")
    with pytest.raises(Refused, match=r"config\.json belongs to a whole model"):
        registry.push(folder, NAME, actor="me")


def test_nothing_wears_a_whole_model_and_the_refusal_names_the_cure(
    registry: Registry, base: BaseModel, tmp_path: Path
) -> None:
    version = registry.push(make_whole(tmp_path / "made", base), NAME, actor="me").version
    with pytest.raises(Refused, match=r"wardrobe extract acme/whole@v1 --push"):
        registry.fetch(version.ref)
    with pytest.raises(Refused, match=r"wardrobe extract acme/whole@v1 --push"):
        registry.promote(NAME, 1, reason="why not", actor="me", force=True)
    assert registry.aliases(NAME) == []
