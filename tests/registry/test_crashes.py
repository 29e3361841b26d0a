"""kill -9, full disks and failing disks: what was acknowledged is there, nothing is half there."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.adapter import PRODUCTION, Selector
from registry.base import Bases
from registry.errors import StoreUnavailable
from registry.store import Registry
from tests.registry.crashing import ACK, NAME, acknowledged

Adapter = Callable[..., Path]
ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "tests.registry.crashing"]


def kill_campaign(root: Path, bases: Bases, kills: int, rng: random.Random) -> int:
    """Kill a working process `kills` times; return how much was acknowledged."""
    log = root / "acknowledged.jsonl"
    zygote = subprocess.Popen(
        [*COMMAND, "zygote", str(root), str(log)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert zygote.stdin
    assert zygote.stdout
    with zygote:
        for seed in range(kills):
            zygote.stdin.write(f"{seed}\n")
            zygote.stdin.flush()
            before = log.stat().st_size if log.exists() else 0
            worker = int(zygote.stdout.readline())
            if seed % 2:  # every second one gets something acknowledged, however slow the machine
                wait_for_growth(log, before + 1)  # one byte is the new worker's line end
            time.sleep(rng.uniform(0.02, 0.25))
            os.kill(worker, signal.SIGKILL)
            if seed % 20 == 19:
                check_store(root, bases, log)
    return check_store(root, bases, log)


def wait_for_growth(log: Path, before: int) -> None:
    deadline = time.monotonic() + 30
    while not log.exists() or log.stat().st_size <= before:
        assert time.monotonic() < deadline, "nothing was acknowledged for 30 seconds"
        time.sleep(0.005)


def check_store(root: Path, bases: Bases, log: Path) -> int:
    notes = acknowledged(log)
    with Registry.open(root / "home", bases) as registry:
        report = registry.verify()
        assert report.ok, report.problems
        if not notes:
            return 0
        stored = {version.number: version.digest for version in registry.versions(NAME)}
        assert list(stored) == list(range(1, len(stored) + 1))
        moves = registry.history(NAME, PRODUCTION)
        assert [move.generation for move in moves] == list(range(1, len(moves) + 1))
        for what, number, key in notes:
            if what == "push":
                assert stored[number] == key
            else:
                move = moves[int(key) - 1]
                assert (move.action, move.number) == (what, number)
        assert registry.resolve(Selector(NAME, alias=PRODUCTION)).number == moves[-1].number
    return len(notes)


def test_kill_9_at_100_random_points_loses_nothing_acknowledged(
    tmp_path: Path, bases: Bases
) -> None:
    assert kill_campaign(tmp_path, bases, 100, random.Random(1)) >= 50


@pytest.mark.long
def test_kill_9_at_1000_random_points_loses_nothing_acknowledged(
    tmp_path: Path, bases: Bases
) -> None:
    assert kill_campaign(tmp_path, bases, 1000, random.Random(2)) >= 500


def test_processes_that_push_at_once_agree_on_every_number(tmp_path: Path, bases: Bases) -> None:
    """Half of the content is the same in both, half is different."""
    seeds = ["0,1,2,3,4,5,6,7", "0,11,2,13,4,15,6,17"]
    running = [
        subprocess.Popen(
            [*COMMAND, "many", str(tmp_path), part], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for part in seeds
    ]
    pushes = [json.loads(line) for p in running for line in p.communicate()[0].splitlines()]
    assert [process.returncode for process in running] == [0, 0]
    assert len(pushes) == 16
    by_seed: dict[int, set[tuple[int, str]]] = {}
    for seed, number, digest, _ in pushes:
        by_seed.setdefault(seed, set()).add((number, digest))
    assert all(len(answers) == 1 for answers in by_seed.values())
    assert sum(created for *_, created in pushes) == len(by_seed) == 12
    with Registry.open(tmp_path / "home", bases) as registry:
        assert [version.number for version in registry.versions(NAME)] == list(range(1, 13))
        assert registry.verify().ok


# Below: strace, which shows the order of system calls and makes single ones fail.


def strace(arguments: list[str], command: list[str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        ["strace", "-f", "-qq", *arguments, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "Operation not permitted" in done.stderr and "ptrace" in done.stderr:
        pytest.skip("this machine does not allow ptrace")
    return done


TO_ITS_PLACE = re.compile(r'blobs/(tmp/[0-9a-f]+)".*blobs/([0-9a-f]{2})/[0-9a-f]{64}".* = 0$')
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
def test_a_push_is_acknowledged_only_after_everything_is_durable(
    tmp_path: Path, bases: Bases, adapter: Adapter
) -> None:
    Registry.open(tmp_path / "home", bases).close()
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,write"
    command = [*COMMAND, "push", str(tmp_path), str(adapter())]
    done = strace(["-y", "-s", "64", "-e", calls, "-o", str(trace)], command)
    assert done.returncode == 0, done.stderr
    lines = trace.read_text().splitlines()
    acknowledged = next(i for i, line in enumerate(lines) if ACK in line)
    renames = {i: match for i, line in enumerate(lines) if (match := TO_ITS_PLACE.search(line))}
    synced_tables = [
        i for i, line in enumerate(lines) if "sync(" in line and "registry.sqlite-wal" in line
    ]
    assert len(renames) == 2
    for index, found in renames.items():
        before = [line for line in lines[:index] if "fsync(" in line and found[1] in line]
        assert before, "a blob was renamed before its bytes were durable"
        after = [line for line in lines[index:acknowledged] if "fsync(" in line]
        assert any(f"/blobs/{found[2]}>" in line for line in after)
        assert any(line.partition("fsync(")[2].split(">")[0].endswith("/blobs") for line in after)
    assert any(max(renames) < index < acknowledged for index in synced_tables)


@needs_strace
@pytest.mark.parametrize("fault", ["fsync:error=EIO", "rename:error=ENOSPC", "fsync:error=ENOSPC"])
def test_a_failing_disk_fails_the_push_and_leaves_no_version(
    tmp_path: Path, bases: Bases, adapter: Adapter, fault: str
) -> None:
    Registry.open(tmp_path / "home", bases).close()
    folder = adapter()
    command = [*COMMAND, "push", str(tmp_path), str(folder)]
    call = fault.split(":")[0]
    done = strace(["-e", f"trace={call}", "-e", f"inject={fault}", "-o", "/dev/null"], command)
    assert done.returncode == 1
    assert "store_unavailable" in done.stderr
    assert ACK not in done.stdout
    with Registry.open(tmp_path / "home", bases) as registry:
        assert registry.adapters() == []
        assert registry.push(folder, NAME, actor="test").created
        assert registry.verify().ok


def fill(path: Path) -> None:
    """Write zeros until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_refuses_pushes_keeps_answering_and_recovers(
    small_disk: Path, bases: Bases, adapter: Adapter
) -> None:
    with Registry.open(small_disk / "home", bases) as registry:
        first = registry.push(adapter(), NAME, actor="test").version
        filler = small_disk / "filler"
        fill(filler)
        with pytest.raises(StoreUnavailable, match=r"No space|full") as refused:
            registry.push(adapter(seed=1), NAME, actor="test")
        assert "\n" not in str(refused.value), "and not the insides of whoever noticed"
        assert registry.resolve(Selector.parse("acme/support@v1")) == first
        assert [version.number for version in registry.versions(NAME)] == [1]
        filler.unlink()
        assert registry.push(adapter(seed=1), NAME, actor="test").version.number == 2
        assert registry.verify().ok
