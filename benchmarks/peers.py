"""The workload of `throughput` against this server and against others, in one run.

    python -m benchmarks.peers [--cells "8,0;32,0;8,8;32,32"] [--repeats 3] \
        --peer 'vllm=env OMP_NUM_THREADS=2 /opt/vllm/bin/vllm serve {base} \
            --served-model-name base --port {port}' \
        --lora-peer 'vllm with adapters=… --lora-modules {adapters}'

A peer is any command that serves `/v1/completions` for the model `base`: `{base}` is its folder,
`{port}` where it has to listen, `{adapters}` are 32 words name=folder, as vLLM takes them. `--peer`
runs the cells without adapters, `--lora-peer` those with adapters. All servers are up, and every
cell goes round them in turn, so that what else the machine does meets all alike; a peer whose turn
it is not is stopped (SIGSTOP), because some wait by spinning.
Prints one Markdown table: rates, times, how many times as fast as the peer we are, and our share
of the floor (benchmarks/floor.py). A peer that is missing, or does not start, is said and left out.
"""

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from rich.progress import Progress

from benchmarks.floor import Limits, Sizes, floor
from benchmarks.throughput import (
    ADAPTERS,
    fill_registry,
    free_port,
    model_name,
    one_request,
    parse_cells,
    run_cell,
    running_server,
    setup_line,
)
from benchmarks.workload import Cell, Figures, prompts
from registry.base import BaseModel, Bases
from registry.home import default_cache

START_SECONDS = 600
OURS = "wardrobe"


@dataclass(slots=True)
class Server:
    """A server that is up, and what it gave."""

    name: str
    url: str
    adapters: tuple[bool, ...]  # runs cells without adapters, with adapters, or both
    group: int | None = None  # the processes of a peer
    figures: dict[Cell, list[Figures]] = field(default_factory=dict[Cell, list[Figures]])

    def runs(self, cell: Cell) -> bool:
        return (cell.adapters > 0) in self.adapters

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


async def measure(
    servers: list[Server], cells: list[Cell], repeats: int, pool: list[list[int]]
) -> None:
    """Run every cell on every server in turn, each time in another order, with fresh prompts."""
    fresh = iter(pool)
    for server in servers:
        async with turn(server) as session:
            for i in range(ADAPTERS if True in server.adapters else 1):
                name = model_name(i, ADAPTERS if True in server.adapters else 0)
                await one_request(session, server.url, [1 + i, 2, 3], name, 4)
    with Progress() as progress:
        bar = progress.add_task("measuring", total=repeats * len(cells))
        for repeat in range(repeats):
            for cell in cells:
                texts = [next(fresh) for _ in range(cell.requests)]
                here = [server for server in servers if server.runs(cell)]
                for server in here if repeat % 2 == 0 else reversed(here):
                    async with turn(server) as session:
                        figures = await run_cell(session, server.url, cell, texts)
                    server.figures.setdefault(cell, []).append(figures)
                progress.advance(bar)


@contextlib.asynccontextmanager
async def turn(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    """Let a server run, with connections of its own: those of an earlier turn may be dead."""
    timeout, connector = aiohttp.ClientTimeout(total=1800), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with server.awake():
            yield session


def table(servers: list[Server], cells: list[Cell], floors: dict[Cell, float]) -> str:
    lines = [
        "| C | adapters | server | tok/s (min–max) | TTFT p50 ms | ITL p50 ms | p95 | p99 "
        "| wardrobe ÷ it | of the floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        ours = Figures.median(servers[0].figures[cell]).tokens_per_second
        for server in servers:
            if repeats := server.figures.get(cell):
                m, rates = Figures.median(repeats), [r.tokens_per_second for r in repeats]
                lines.append(
                    f"| {cell.clients} | {cell.adapters} | {server.name} "
                    f"| {m.tokens_per_second:.0f} ({min(rates):.0f}–{max(rates):.0f}) "
                    f"| {m.ttft_p50:.0f} | {m.itl_p50:.1f} | {m.itl_p95:.1f} | {m.itl_p99:.1f} "
                    f"| {ours / m.tokens_per_second:.2f} "
                    f"| {m.tokens_per_second / floors[cell]:.2f} |"
                )
    return "\n".join(lines)


def peers(
    stack: contextlib.ExitStack, options: argparse.Namespace, home: Path, base: BaseModel
) -> Iterator[Server]:
    """Start what the options name; what cannot be started is said and left out."""
    made = sorted((home / "made").iterdir())
    words = " ".join(f"bench/{folder.name}={folder}" for folder in made)
    named = [(text, (False,)) for text in options.peer]
    named += [(text, (True,)) for text in options.lora_peer]
    for i, (text, adapters) in enumerate(named):
        name, _, command = text.partition("=")
        port, log = free_port(), home / f"peer-{i}.log"
        filled = command.format(base=base.path, port=port, adapters=words)
        group = stack.enter_context(started(filled, log, port))
        if isinstance(group, str):
            print(f"{name} is left out: {group}")
        else:
            yield Server(name, f"http://127.0.0.1:{port}", adapters, group)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", default="8,0;32,0;8,8;32,32", help="clients,adapters;…")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--lora-peer", action="append", default=[], metavar="NAME=COMMAND")
    options = parser.parse_args()
    cells = parse_cells(options.cells)
    bases = Bases(default_cache() / "bases")
    base = bases.get(options.base)
    limits, sizes = Limits.measure(), Sizes.read(base.path)
    needed = options.repeats * sum(cell.requests for cell in cells)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = Path(folder)
        fill_registry(home, base, bases)
        pool = prompts(str(base.path), needed, seed=0)
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(running_server(home, base.id, ["--no-auth"]))
            servers = [Server(OURS, url, (False, True))]
            servers += peers(stack, options, home, base)
            asyncio.run(measure(servers, cells, options.repeats, pool))
    floors = {cell: floor(cell, sizes, limits) for cell in cells}
    print(f"\n{setup_line(base, options.repeats)}\nLimits: {limits}\n")
    print(table(servers, cells, floors))


if __name__ == "__main__":
    main()
