"""Number formats, devices, files and limits of the torch engine."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engine.boundary import EngineUnavailable
from serving.engine.engine import TorchEngine
from serving.engine.settings import DeviceName, DtypeName, EngineSettings, option
from tests import tiny
from tests.serving.engine.driving import Folders, base_of, request, run_all


@pytest.fixture(scope="module")
def signature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Folders]:
    folder = tmp_path_factory.mktemp("signature")
    base = tiny.make_signature_base(folder / "base")
    made = {str(t): tiny.make_signature_adapter(folder / str(t), base, t) for t in range(60, 70)}
    return base, Folders(made)


def signs(base: Path, folders: Folders, device: DeviceName, dtype: DtypeName) -> None:
    settings = EngineSettings(device=device, dtype=dtype, max_model_len=96, adapter_slots=5)
    tokens = [int(name) for name in folders.refs] + [tiny.SIGNATURE_BASE_TOKEN]
    wanted = [
        request([i] * (1 + 5 * i), folders.refs.get(str(token)), max_tokens=6)
        for i, token in enumerate(tokens)
    ]
    results = run_all(TorchEngine.create(base_of(base), folders, settings), wanted)
    assert [result.tokens for result in results] == [[token] * 6 for token in tokens]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_every_number_format_wears_every_adapter(
    signature: tuple[Path, Folders], dtype: DtypeName
) -> None:
    signs(*signature, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_gpu_wears_every_adapter(signature: tuple[Path, Folders], dtype: DtypeName) -> None:
    signs(*signature, "cuda", dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny_base: Path, tiny_folders: Folders) -> None:
    with pytest.raises(EngineUnavailable, match="CUDA"):
        TorchEngine.create(base_of(tiny_base), tiny_folders, EngineSettings(device="cuda"))


def test_shards_give_what_one_file_gives(
    tmp_path: Path, tiny_base: Path, tiny_folders: Folders
) -> None:
    tensors = load_file(tiny_base / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for path in tiny_base.iterdir():
        if path.name != "model.safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    for shard in range(3):
        name = f"model-{shard}.safetensors"
        save_file({key: tensors[key] for key in names[shard::3]}, tmp_path / name)
        weight_map |= dict.fromkeys(names[shard::3], name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = EngineSettings(device="cpu", dtype="float32", max_model_len=64)
    wanted = [request("shards", tiny_folders.refs["a"], max_tokens=10)]
    whole, sharded = (
        run_all(TorchEngine.create(base_of(base), tiny_folders, settings), wanted)
        for base in (tiny_base, tmp_path)
    )
    assert whole == sharded


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"intermediate_size": 100}, "shape"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_a_base_that_would_be_computed_wrongly_is_refused_at_start(
    tmp_path: Path, tiny_base: Path, change: dict[str, object], words: str
) -> None:
    for path in tiny_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(EngineUnavailable, match=words):
        TorchEngine.create(base_of(tmp_path), Folders({}), EngineSettings(device="cpu"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EngineSettings(device="cpu", max_model_len=1000), "512"),
        (EngineSettings(device="cpu", kv_cache_bytes=1000), "--kv-cache-memory=1000"),
    ],
)
def test_a_length_that_does_not_fit_is_refused_at_start(
    tiny_base: Path, settings: EngineSettings, words: str
) -> None:
    with pytest.raises(EngineUnavailable, match=words):
        TorchEngine.create(base_of(tiny_base), Folders({}), settings)


def test_the_length_follows_the_kv_budget_when_it_is_not_given(tiny_base: Path) -> None:
    # 2 layers, K and V, 2 KV heads of 16 numbers of 4 bytes: 512 bytes a token.
    settings = EngineSettings(
        device="cpu", dtype="float32", max_running=4, kv_cache_bytes=150 * 512
    )
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), settings)
    assert engine.max_model_len == 128
    assert run_all(engine, [request("x", max_tokens=127)])[0].finish == "length"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_running": 0},
        {"kv_cache_bytes": 0},
        {"max_waiting": -1},
        {"threads": 0},
        {"max_running": 64, "max_batched_tokens": 64},
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=option(next(iter(wrong)))):
        EngineSettings(**wrong)  # type: ignore[arg-type]  # that is the point
