"""Building the operators: what is cached, what is rebuilt, and what happens where none can be."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from serving.engine.build import read_model
from serving.engine.engine import TorchEngine
from serving.engine.ops.native import target as target_module
from serving.engine.ops.native.compile import NotCompiled, compiled
from serving.engine.ops.native.library import Library, load_library
from serving.engine.ops.native.target import AMX_BF16, Target, runnable_targets
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, base_of, request, run_all

QUICK = Target("quick to build", ("-O0",))
RUNNABLE = runnable_targets(torch.bfloat16)
SETTINGS = EngineSettings(device="cpu", dtype="float32", max_model_len=64)


def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and a PATH without a compiler."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("WARDROBE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "bin"


def stats_of(base: Path, folders: Folders, settings: EngineSettings) -> str:
    engine = TorchEngine.create(base_of(base), folders, settings)
    result = run_all(engine, [request("abc", folders.refs["a"], max_tokens=4)])
    assert len(result[0].tokens) == 4
    return engine._parts.stats.operators


def test_without_a_compiler_torch_computes_and_says_so_once(
    tiny_base: Path,
    tiny_folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    nowhere(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        operators = stats_of(tiny_base, tiny_folders, SETTINGS)
    assert operators.startswith("torch (there is no g++")
    assert [record.message for record in caplog.records if "g++" in record.message] == [
        "torch computes, several times slower than C++: there is no g++ on the PATH; "
        "install it (Debian: apt install g++)"
    ]


def test_a_compiler_that_fails_is_quoted_and_torch_computes(
    tiny_base: Path, tiny_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = nowhere(monkeypatch, tmp_path) / "g++"
    broken.write_text("#!/bin/sh\necho 'error: out of luck' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "out of luck" in stats_of(tiny_base, tiny_folders, SETTINGS)
    assert not list((tmp_path / "cache" / "operators").glob("*.so"))


@pytest.mark.skipif(len(RUNNABLE) == 1, reason="this processor has one set of instructions only")
def test_a_compiler_that_does_not_know_the_newest_instructions_builds_for_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = RUNNABLE[:2]
    unknown = next(flag for flag in newest.flags if flag not in older.flags)
    old = nowhere(monkeypatch, tmp_path) / "g++"
    real = shutil.which("g++", path=os.defpath)
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *{unknown}*) echo "error: {unknown}?" >&2; exit 1;; esac\n'
        f'PATH={os.defpath} exec {real} "$@"\n'
    )
    old.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        library = load_library(torch.bfloat16, tmp_path / "cache")
    assert library.target is older
    (said,) = (record.message for record in caplog.records)
    assert said.startswith(f"C++ ({older.name}) computes, not the best there is: ")
    assert said.endswith(f"g++ failed: error: {unknown}?")
    assert library.greedy(torch.tensor([[1.0, 3.0, 2.0]]).bfloat16())[0].tolist() == [1]


def test_instructions_that_the_system_refuses_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "XFEATURE_XTILEDATA", 62)  # of which Linux knows nothing
    assert AMX_BF16 not in runnable_targets(torch.bfloat16)
    with pytest.raises(NotCompiled, match="does not let this process use AMX BF16"):
        Library(tmp_path / "nowhere.so", AMX_BF16, torch.bfloat16)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotCompiled, match="cannot be written"):
        compiled(QUICK, torch.float32, tmp_path / "file" / "cache")


def test_torch_computes_when_it_is_asked_for_and_the_log_says_what_does(
    tiny_base: Path, tiny_folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    best = f"C++ ({runnable_targets(torch.float32)[0].name})"
    with caplog.at_level(logging.INFO, "serving.engine.engine"):
        asked = replace(SETTINGS, operators="torch")
        assert stats_of(tiny_base, tiny_folders, asked) == "torch"
        assert stats_of(tiny_base, tiny_folders, SETTINGS) == best
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert said == [f"computing with {name} in float32" for name in ("torch", best)]


def test_a_base_that_the_compiled_pass_does_not_cover_is_computed_by_torch(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    settings = EngineSettings(device="cpu", dtype="float16", max_model_len=64)
    assert "not torch.float16" in read_model(base_of(tiny_base), settings).operators


def test_a_library_is_built_once_and_again_when_it_is_damaged(tmp_path: Path) -> None:
    path = compiled(QUICK, torch.float32, tmp_path)
    built = path.stat().st_mtime_ns
    assert compiled(QUICK, torch.float32, tmp_path) == path
    assert path.stat().st_mtime_ns == built
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:5000] + b"\0" + whole[5001:]):
        path.write_bytes(damaged)
        assert compiled(QUICK, torch.float32, tmp_path) == path
        assert len(path.read_bytes()) == len(whole)
    load_library(torch.float32, tmp_path, QUICK)


def test_processes_that_need_it_at_once_build_it_once(tmp_path: Path) -> None:
    """A g++ on the PATH counts how often it is called: twice a build, to compile and to link."""
    calls, wrapper = tmp_path / "calls", tmp_path / "bin" / "g++"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\necho call >> {calls}\nPATH={os.environ["PATH"]} exec g++ "$@"\n'
    )
    wrapper.chmod(0o755)
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        import torch
        from serving.engine.ops.native.library import load_library
        from serving.engine.ops.native.target import Target
        library = load_library(torch.float32, Path({str(tmp_path)!r}), Target("quick", ("-O0",)))
        assert library.greedy(torch.tensor([[1.0, 3.0, 2.0]]))[0].tolist() == [1]
        """
    )
    environment = os.environ | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
    racers = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    deadline = time.monotonic() + 240
    assert [racer.wait(deadline - time.monotonic()) for racer in racers] == [0, 0]
    assert calls.read_text() == "call\n" * 2
