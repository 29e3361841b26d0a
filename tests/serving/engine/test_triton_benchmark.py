"""`python -m benchmarks.gpu`, small and interpreted: what a GPU machine would run."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from benchmarks import gpu
from serving.engine.lora import LoraLayout
from tests import tiny
from tests.serving.engine.kernels import interpreting, share_out_to_few

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *options])
    with tiny.peft_on_new_transformers():
        gpu.main()


@pytest.mark.long
@interpreting
def test_the_benchmark_fills_a_table_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_out_to_few(monkeypatch)
    results, table = tmp_path / "results.jsonl", tmp_path / "table.md"
    small = ("--shape", "tiny", "--device", "cpu", "--steps", "1", "--context", "8")
    files = ("--results", str(results), "--table", str(table))
    with pytest.raises(SystemExit, match="goes on from here"):
        run(monkeypatch, *small, *files, "--minutes", "0")
    run(monkeypatch, *small, *files)
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d*) \| ([\d.]+) \|", table.read_text(), re.M)
    decoding = [("1", "0", ""), ("1", "1", "4"), ("2", "0", ""), ("2", "1", "4"), ("2", "2", "4")]
    reading = [("3", "0", ""), ("3", "1", "4"), ("12", "0", ""), ("12", "1", "4")]
    assert [row[:3] for row in rows] == decoding + reading
    assert all(float(row[3]) > 0 for row in rows)
    assert not re.search(r"\|\s*\|$", table.read_text(), re.M), "PEFT's time is missing"
    columns = [line.split("|") for line in table.read_text().splitlines()]
    dressed = {c[7].strip() != "" for c in columns if len(c) == 10 and c[2] in (" 1 ", " 2 ")}
    assert dressed == {True}, "the time with vectors"
    measured = results.read_text()
    run(monkeypatch, *small, *files)
    assert results.read_text() == measured


@interpreting
def test_adapters_that_fit_without_vectors_only_are_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import gpu_bodies

    share_out_to_few(monkeypatch)
    spec, dtype = gpu_bodies.SPECS["tiny"], torch.float32
    two = 2 * LoraLayout(spec.layers, spec.groups).size(8) * dtype.itemsize
    monkeypatch.setattr(gpu_bodies, "_adapter_memory", lambda *_: two)
    steps = gpu_bodies.Wardrobe("tiny", 8, 72, 2, torch.device("cpu"))
    steps.step(gpu.Cell("tiny", 2, 2, 4, "wardrobe"))
    with pytest.raises(torch.OutOfMemoryError, match="with vectors"):
        steps.step(gpu.Cell("tiny", 2, 2, 4, "dressed"))


def test_a_machine_without_a_gpu_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"no CUDA device.*--shape tiny --device cpu"):
        run(monkeypatch, "--results", str(tmp_path / "results.jsonl"))
