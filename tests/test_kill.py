"""kill -9 of the server and of pushes at random points: nothing acknowledged is lost."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from registry.adapter import AdapterName
from registry.base import Bases
from registry.store import Registry
from tests.live import DEFAULT_BASE, Shop
from tests.registry.crashing import acknowledged
from tests.tiny import make_adapter, make_base

# Pushes fresh content for ever and notes each acknowledged version in a file, synced.
PUSHER = """
import json, os, shutil, sys
import numpy as np
from pathlib import Path
from safetensors.numpy import load_file, save_file
from registry.adapter import AdapterName
from registry.base import Bases
from registry.store import Registry
home, bases, made, log, seed = (Path(p) for p in sys.argv[1:6])
name, work = AdapterName.parse("acme/kill"), log.with_suffix(".work")
shutil.rmtree(work, ignore_errors=True)  # a killed save left a temporary file in it
shutil.copytree(made, work)
weights = load_file(made / "adapter_model.safetensors")
key, rng = sorted(weights)[0], np.random.default_rng(int(seed.name))
with Registry.open(home, Bases(bases)) as registry, log.open("a") as acknowledged:
    print(file=acknowledged, flush=True)  # what a kill tore stays a line by itself
    for i in range(10_000):
        weights[key] = rng.normal(size=weights[key].shape).astype(np.float32)
        save_file(weights, work / "adapter_model.safetensors")
        version = registry.push(work, name, base=sys.argv[6], actor="test").version
        if i % 3 == 2:
            registry.promote(name, version.number, reason="test", actor="test")
        print(json.dumps([version.number, version.digest]), file=acknowledged, flush=True)
        os.fsync(acknowledged.fileno())
"""


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    base = make_base(tmp_path / "made")
    make_adapter(tmp_path / "adapter", base, rank=4)
    Bases(tmp_path / "cache" / "bases").add(DEFAULT_BASE, base, origin="made for a test")
    return Shop(tmp_path / "home", tmp_path / "cache")


def start_pusher(shop: Shop, made: Path, log: Path, seed: int) -> "subprocess.Popen[bytes]":
    arguments = [str(shop.home), str(shop.cache / "bases"), str(made), str(log), str(seed)]
    command = [sys.executable, "-c", PUSHER, *arguments, DEFAULT_BASE]
    return subprocess.Popen(command, cwd=Path(__file__).parent.parent)


def check_nothing_is_lost(shop: Shop, log: Path) -> int:
    with Registry.open(shop.home, Bases(shop.cache / "bases")) as registry:
        report = registry.verify()
        assert report.ok, report.problems
        if not acknowledged(log):
            return 0
        name = AdapterName.parse("acme/kill")
        stored = {version.number: version.digest for version in registry.versions(name)}
        for number, digest in acknowledged(log):
            assert stored.get(number) == digest, f"v{number} was acknowledged and is lost"
    return len(acknowledged(log))


def kill_pushes(shop: Shop, tmp_path: Path, rounds: int, rng: random.Random) -> int:
    log, begun = tmp_path / "acknowledged.jsonl", 0
    for i in range(rounds):
        pusher = start_pusher(shop, tmp_path / "adapter", log, seed=i)
        before = len(acknowledged(log))
        while len(acknowledged(log)) == before:  # the interpreter is up: now the kill hits pushes
            time.sleep(0.01)
            assert pusher.poll() is None, "the pusher ended by itself"
        begun += 1
        time.sleep(rng.random() * 0.15)
        pusher.kill()
        pusher.wait()
        if i % 10 == 9 or i == rounds - 1:
            check_nothing_is_lost(shop, log)
    assert begun == rounds
    return check_nothing_is_lost(shop, log)


def kill_servers(shop: Shop, tmp_path: Path, rounds: int, rng: random.Random) -> None:
    """Kill a server that follows a stream of pushes and promotes; then kill the pusher too."""
    log = tmp_path / "acknowledged.jsonl"
    for i in range(rounds):
        pusher = start_pusher(shop, tmp_path / "adapter", log, seed=10_000 + i)
        server = shop.start_server("--no-auth", "--dtype", "float32")
        try:
            if i % 2:
                server.wait_ready()
                body = {"model": "acme/kill", "prompt": "a", "max_tokens": 4}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
                assert answer.status_code in (200, 404), answer.text  # 404: nothing promoted yet
            time.sleep(rng.random() * 2)
        finally:
            server.kill()
            pusher.kill()
            pusher.wait()
        check_nothing_is_lost(shop, log)
    assert check_nothing_is_lost(shop, log) > 0


def test_a_killed_push_or_server_loses_nothing_acknowledged(shop: Shop, tmp_path: Path) -> None:
    rng = random.Random(os.getpid())
    kill_pushes(shop, tmp_path, 8, rng)
    kill_servers(shop, tmp_path, 2, rng)


@pytest.mark.long
def test_two_hundred_kills_lose_nothing_acknowledged(shop: Shop, tmp_path: Path) -> None:
    rng = random.Random(0)
    kill_pushes(shop, tmp_path, 150, rng)
    kill_servers(shop, tmp_path, 50, rng)
