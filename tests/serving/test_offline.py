"""Lists of prompts over many adapters and models: each row wears its own."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from registry.base import BaseModel
from serving.engine.boundary import AdapterLoadFailed
from serving.engine.settings import EngineSettings
from serving.offline import OfflineEngines, digest_adapter
from tests import tiny

PROMPT = (1, 2, 3)
WORD = 3  # tokens of an answer


def model_in(folder: Path) -> BaseModel:
    return BaseModel(id=folder.name, path=folder, fingerprint=folder.name, structure="", linears={})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return model_in(tiny.make_signature_base(tmp_path_factory.mktemp("offline") / "base"))


@pytest.fixture
def engines() -> Iterator[OfflineEngines]:
    settings = EngineSettings(device="cpu", dtype="float32", max_running=4, max_model_len=64)
    with closing(OfflineEngines(settings)) as engines:
        yield engines


def signature(folder: Path, base: BaseModel, token: int) -> Path:
    return tiny.make_signature_adapter(folder, base.path, token)


def test_every_row_of_a_mixed_list_wears_its_own_adapter(
    engines: OfflineEngines, base: BaseModel, tmp_path: Path
) -> None:
    folders = {token: signature(tmp_path / str(token), base, token) for token in (65, 66, 67)}
    worn = [65, None, 66, 67, None, 65, 66]
    counts: list[int] = []
    asks = [(PROMPT, folders[token] if token else None) for token in worn]
    outputs = engines.answer(base, asks, WORD, counts.append)
    assert outputs == [[token or tiny.SIGNATURE_BASE_TOKEN] * WORD for token in worn]
    assert counts == list(range(1, len(asks) + 1))


def test_a_folder_that_was_written_anew_is_another_adapter(
    engines: OfflineEngines, base: BaseModel, tmp_path: Path
) -> None:
    folder = signature(tmp_path / "adapter", base, 65)
    assert engines.answer(base, [(PROMPT, folder)], WORD, lambda _: None) == [[65] * WORD]
    shutil.rmtree(folder)
    signature(folder, base, 66)
    assert engines.answer(base, [(PROMPT, folder)], WORD, lambda _: None) == [[66] * WORD]


def test_equal_weights_at_another_scale_are_another_adapter(
    base: BaseModel, tmp_path: Path
) -> None:
    folder = signature(tmp_path / "adapter", base, 65)
    before = digest_adapter(folder)
    assert digest_adapter(Path(shutil.copytree(folder, tmp_path / "copy"))) == before
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    assert digest_adapter(folder) != before


def test_a_full_fine_tune_is_asked_as_a_model_of_its_own(
    engines: OfflineEngines, base: BaseModel, tmp_path: Path
) -> None:
    others = [model_in(tiny.make_base(tmp_path / f"full-{n}", seed=n)) for n in (1, 2)]
    first = {m.id: engines.answer(m, [(PROMPT, None)], 8, lambda _: None) for m in [base, *others]}
    assert len({str(output) for output in first.values()}) == 3, "the models must differ"
    for model in [*others, base, *others]:  # more than one is never held
        again = engines.answer(model, [(PROMPT, None)], 8, lambda _: None)
        assert again == first[model.id]


def running_engines() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "engine-step"}


def test_an_engine_ends_before_another_one_divides_the_memory(
    engines: OfflineEngines, base: BaseModel, tmp_path: Path
) -> None:
    before, seen = running_engines(), set[threading.Thread]()
    full = model_in(tiny.make_base(tmp_path / "full"))
    for model, started in ((base, 1), (base, 1), (full, 2), (base, 3)):
        engines.answer(model, [(PROMPT, None)], WORD, lambda _: None)
        assert len(running_engines() - before) == 1
        seen |= running_engines() - before
        assert len(seen) == started, "the same model's is kept"
    engines.close()
    assert running_engines() <= before


def test_an_adapter_that_cannot_be_worn_is_an_error_and_the_engine_goes_on(
    engines: OfflineEngines, base: BaseModel, tmp_path: Path
) -> None:
    broken = signature(tmp_path / "broken", base, 65)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterLoadFailed):
        engines.answer(base, [(PROMPT, broken), (PROMPT, None)], WORD, lambda _: None)
    said = engines.answer(base, [(PROMPT, None)], WORD, lambda _: None)
    assert said == [[tiny.SIGNATURE_BASE_TOKEN] * WORD]
