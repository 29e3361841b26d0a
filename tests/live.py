"""Real processes for tests: the command line, and a server on a free loopback port."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from registry.home import default_cache

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass(frozen=True, slots=True)
class Shop:
    """A home and a cache of base models; commands run against them."""

    home: Path
    cache: Path

    def __post_init__(self) -> None:
        """Share the compiled operators: building them takes longer than most tests."""
        self.cache.mkdir(parents=True, exist_ok=True)
        shared, own = default_cache() / "operators", self.cache / "operators"
        shared.mkdir(parents=True, exist_ok=True)
        if not own.is_symlink():
            own.symlink_to(shared)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "WARDROBE_HOME": str(self.home),
            "WARDROBE_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def start(self, *arguments: str, output: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "wardrobe", *arguments]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=output, stderr=subprocess.STDOUT
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run one command to its end; return what it printed."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == status, f"{arguments} gave {process.returncode}:\n{output}"
        return output

    def json(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "wardrobe", *arguments, "--json"]
        done = subprocess.run(
            command, env=self.environment, text=True, capture_output=True, check=False, timeout=240
        )
        assert done.returncode == 0, f"{arguments} gave {done.returncode}:\n{done.stderr}"
        return json.loads(done.stdout)

    @contextlib.contextmanager
    def serving(self, *arguments: str) -> Iterator["LiveServer"]:
        server = self.start_server(*arguments)
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()

    def start_server(self, *arguments: str) -> "LiveServer":
        port = free_port()
        log = self.home.parent / f"server-{port}.log"
        with log.open("wb") as file:
            process = self.start("serve", "--port", str(port), *arguments, output=file)
        return LiveServer(f"http://127.0.0.1:{port}", process, log)


@dataclass(frozen=True, slots=True)
class LiveServer:
    url: str
    process: subprocess.Popen[str]
    log: Path

    def wait_ready(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, f"ended at start:\n{self.log.read_text()[-3000:]}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"not ready in 60 s:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
