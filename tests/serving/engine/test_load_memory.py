"""What a load takes: its file and what it is converted to, each once, and known beforehand."""

import ctypes
import gc
import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.engine.build import assemble, read_model
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.peft_cases import Case, make, other
from tests.serving.engine.driving import Folders, base_of, wait_for_pages

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
FEW = 24 << 20  # bytes of the pieces in which rows are converted, and what is kept of them

pytestmark = pytest.mark.skipif(
    not FORGET_PEAK.exists(), reason="Linux tells the peak of a process"
)


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


@pytest.fixture(scope="module")
def misaligned(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but every number begins at an odd byte."""
    folder = tmp_path_factory.mktemp("wide") / "misaligned"
    weights = shutil.copytree(adapter, folder) / "adapter_model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" "
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return folder


def save_prefix(folder: Path) -> tuple[Path, Path]:
    """Write a base, and an adapter for it with keys and values of 32 MiB."""
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    base = tiny.make_base(folder / "base", layers=8, hidden=HIDDEN, **heads)
    config = other("PrefixTuningConfig", num_virtual_tokens=1024)
    return base, make(Case("Prefix tuning", "worn", "", config), base, folder / "adapter")


def memory(field: str) -> int:
    """Return bytes of this process by a name of proc(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [found] = [line for line in lines if line.startswith(f"{field}:")]
    return int(found.split()[1]) << 10


@dataclass(frozen=True)
class Taken:
    """Bytes of a load."""

    known: int  # what the loader counts
    peak: int  # the most at once
    left: int


def taken_here(base: Path, adapter: Path, operators: OperatorsName) -> Taken:
    torch.set_num_threads(1)
    with suppress(AttributeError):  # not glibc, which keeps much of what is freed: M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    folders, settings = Folders({"wide": adapter}), replace(SETTINGS, operators=operators)
    with torch.inference_mode():
        core = assemble(read_model(base_of(base), settings), folders, settings).core
    loader, ref = core.residency.loader, folders.refs["wide"]
    loader.load(ref).result(60)  # what only the first one takes, code for example, is not its own
    while loader._loads:  # the worker lets go of it in its own time
        time.sleep(0.001)
    wait_for_pages()
    gc.collect()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    FORGET_PEAK.write_text("5")
    loaded = loader.load(ref).result(60)
    peak = memory("VmHWM") - before
    known = loader._measure(adapter)
    loader.close()
    return Taken(known, peak, loaded.size_bytes)


def taken_by_a_load(base: Path, adapter: Path, operators: OperatorsName) -> Taken:
    """Load it in a process of its own: here other tests' memory may go meanwhile."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(taken_here, base, adapter, operators).result(120)


both_operators = pytest.mark.parametrize(
    "operators", ["auto", pytest.param("torch", marks=pytest.mark.long)]
)


@both_operators
def test_a_saved_head_is_held_once_as_it_is_in_the_file_and_once_converted(
    base: Path, adapter: Path, operators: OperatorsName
) -> None:
    """It was held six times."""
    taken = taken_by_a_load(base, adapter, operators)
    file = (adapter / "adapter_model.safetensors").stat().st_size
    assert taken.left >= VOCAB * HIDDEN * 4
    assert taken.peak < 1.4 * (file + taken.left)


@both_operators
def test_what_is_misaligned_in_its_file_is_counted_twice(
    base: Path, misaligned: Path, operators: OperatorsName
) -> None:
    taken = taken_by_a_load(base, misaligned, operators)
    assert taken.peak < taken.known + FEW


@both_operators
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_prefix_is_held_twice_beside_its_file(tmp_path: Path, operators: OperatorsName) -> None:
    """It was held three times, and counted once."""
    base, adapter = save_prefix(tmp_path)
    taken = taken_by_a_load(base, adapter, operators)
    file = (adapter / "adapter_model.safetensors").stat().st_size
    assert taken.left >= 32 << 20
    assert taken.peak < file + 2 * taken.left + FEW
    assert taken.peak < taken.known + FEW
