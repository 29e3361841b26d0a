"""What a load takes: its file and what it is converted to, each once, and known beforehand."""

import ctypes
import gc
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engine.build import assemble, read_model
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.serving.engine.driving import Folders, base_of

SETTINGS = EngineSettings(
    device="cpu",
    dtype="float32",
    max_running=2,
    max_model_len=64,
    adapter_memory=256 << 20,
    prefix_cache_bytes=0,
)
VOCAB, HIDDEN = 32_768, 256
FORGET_PEAK = Path("/proc/self/clear_refs")  # proc(5): 5 makes the peak what is there now


def save_head(folder: Path, base: Path) -> Path:
    """Write an adapter with a head of its own, 32 MiB, no row of which is the base's."""
    weights = tiny.make_adapter(folder, base) / "adapter_model.safetensors"
    config = folder / "adapter_config.json"
    head = {"base_model.model.lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    save_file(load_file(weights) | head, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["lm_head"]}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "base"
    return tiny.make_base(folder, vocab=VOCAB, hidden=HIDDEN, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_head(tmp_path_factory.mktemp("wide") / "adapter", base)


def memory(field: str) -> int:
    """Return bytes of this process by a name of proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [found] = [line for line in lines if line.startswith(f"{field}:")]
    return int(found.split()[1]) << 10


def peak_of_a_load(base: Path, adapter: Path, operators: OperatorsName) -> tuple[int, int]:
    """Return the most bytes that a load took at once, and those of what it left."""
    torch.set_num_threads(1)
    folders, settings = Folders({"wide": adapter}), replace(SETTINGS, operators=operators)
    with torch.inference_mode():
        core = assemble(read_model(base_of(base), settings), folders, settings).core
    gc.collect()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    FORGET_PEAK.write_text("5")
    loaded = core.residency.loader.load(folders.refs["wide"]).result(60)
    peak = memory("VmHWM") - before
    core.residency.loader.close()
    return peak, loaded.size_bytes


@pytest.mark.skipif(not FORGET_PEAK.exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("operators", ["auto", pytest.param("torch", marks=pytest.mark.long)])
def test_a_saved_head_is_held_once_as_it_is_in_the_file_and_once_converted(
    base: Path, adapter: Path, operators: OperatorsName
) -> None:
    """In a process of its own: here other tests' memory may go meanwhile. It was held six times."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        peak, converted = process.submit(peak_of_a_load, base, adapter, operators).result(120)
    file = (adapter / "adapter_model.safetensors").stat().st_size
    assert converted >= VOCAB * HIDDEN * 4
    assert peak < 1.4 * (file + converted)
