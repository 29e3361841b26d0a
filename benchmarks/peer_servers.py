"""The servers of `benchmarks.peers`: started together, and awake one at a time."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.throughput import NO_PREFIX_CACHE, free_port, one_request, running_server
from benchmarks.workload import Cell
from registry.base import BaseModel

START_SECONDS = 600


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the servers that are compared."""

    name: str
    command: str  # "" is our own
    adapters: tuple[bool, ...]  # runs cells without adapters, with adapters, or both

    def runs(self, cell: Cell) -> bool:
        return (cell.adapters > 0) in self.adapters


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up."""

    peer: Peer
    url: str
    group: int | None = None  # the processes of a peer

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let a peer run for as long as this lasts."""
        if self.group is None:
            yield
            return
        os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGSTOP)


@contextlib.asynccontextmanager
async def turn(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    """Let a server run, with connections of its own: those of an earlier turn may be dead."""
    timeout, connector = aiohttp.ClientTimeout(total=1800), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with server.awake():
            yield session


def up(
    stack: contextlib.ExitStack, peers: Sequence[Peer], home: Path, base: BaseModel
) -> Iterator[Server]:
    """Start the peers; what cannot be started is said and left out."""
    words = " ".join(
        f"bench/{folder.name}={folder}" for folder in sorted((home / "made").iterdir())
    )
    for i, peer in enumerate(peers):
        if not peer.command:
            url = stack.enter_context(
                running_server(home, base.id, ["--no-auth", *NO_PREFIX_CACHE])
            )
            yield Server(peer, url)
            continue
        port, log = free_port(), home / f"peer-{i}.log"
        filled = peer.command.format(base=base.path, port=port, adapters=words)
        group = stack.enter_context(started(filled, log, port))
        if isinstance(group, str):
            print(f"{peer.name} is left out: {group}")
        else:
            yield Server(peer, f"http://127.0.0.1:{port}", group)


@contextlib.contextmanager
def started(command: str, log: Path, port: int) -> Iterator[int | str]:
    """Run a peer; yield its process group, stopped, or why there is none.

    It ends with all that it started.
    """
    words = shlex.split(command)
    program = next(word for word in words if word != "env" and "=" not in word)
    if shutil.which(program) is None:
        yield f"there is no {program}"
        return
    with log.open("wb") as output:
        peer = subprocess.Popen(words, stdout=output, stderr=output, process_group=0)  # noqa: S603 - the user's own
        try:
            if failure := asyncio.run(answers(f"http://127.0.0.1:{port}", peer)):
                yield f"{failure}: {log.read_text(errors='replace')[-800:]}"
            else:
                os.killpg(peer.pid, signal.SIGSTOP)
                yield peer.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(peer.pid, signal.SIGTERM)
                os.killpg(peer.pid, signal.SIGCONT)
            peer.wait(60)


async def answers(url: str, peer: subprocess.Popen[bytes]) -> str:
    """Return "" when a completion came, else what went wrong."""
    deadline, last = time.monotonic() + START_SECONDS, ""
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            if peer.poll() is not None:
                return f"it ended at start with {peer.returncode}"
            try:
                await one_request(session, url, [1, 2, 3], "base", 4)
                return ""
            except (aiohttp.ClientError, RuntimeError) as error:
                last = str(error)
            await asyncio.sleep(1)
    return f"no completion in {START_SECONDS} s; the last answer: {last}"
