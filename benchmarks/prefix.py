"""What the prefix cache saves: time to first token behind a few-shot prompt, over HTTP.

    python -m benchmarks.prefix [--tokens 1000] [--requests 16] [--repeats 3]

Two servers, one without the cache, are asked the same in turns. Every prompt is the same beginning
of `--tokens` tokens and a question of its own, of 30 to 60; the last rows have a beginning of
their own, too, and show what keeping costs where nothing comes again. The first request of a model,
which has to read everything, is not in the medians.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from rich.progress import Progress

from benchmarks.throughput import (
    NO_PREFIX_CACHE,
    cpu_name,
    one_request,
    running_server,
    write_adapter,
)
from benchmarks.workload import Record, prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry

NAME = AdapterName("bench", "a")
OUTPUT_TOKENS = 32
CLIENTS = 8
HEAD = """\
| prompts | model | TTFT ms, cache | none | ratio | tok/s of 8, cache | none | ratio |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row: who is asked, and whether the prompts begin alike."""

    model: str
    shared: bool


CELLS = (Cell("base", True), Cell(str(NAME), True), Cell("base", False))


class Texts:
    """Prompts that never come twice."""

    def __init__(self, folder: str, tokens: int, count: int) -> None:
        pieces = iter(prompts(folder, count + tokens // 100, seed=3))
        self._random = random.Random(3)
        self._tokens = tokens
        self._shared = list(itertools.islice(itertools.chain.from_iterable(pieces), tokens))
        self._pieces = pieces

    def next(self, cell: Cell) -> list[int]:
        own = next(self._pieces)
        question = own[: self._random.randint(30, 60)]
        if cell.shared:
            return self._shared + question
        # Another first token makes all of it another text.
        return [own[-1], own[0], *self._shared[2:], *question]


async def alone(
    session: aiohttp.ClientSession, url: str, cell: Cell, asked: Sequence[list[int]]
) -> float:
    """Return milliseconds to the first token, the median over requests one after the other."""
    records = [await one_request(session, url, prompt, cell.model, 2) for prompt in asked]
    return statistics.median((record.events[0] - record.sent) * 1e3 for record in records)


async def together(
    session: aiohttp.ClientSession, url: str, cell: Cell, asked: Sequence[list[int]]
) -> float:
    """Return output tokens per second of clients in a closed loop."""
    left = iter(asked)
    records: list[Record] = []

    async def client() -> None:
        for prompt in left:
            record = await one_request(session, url, prompt, cell.model, OUTPUT_TOKENS)
            records.append(record)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(record.tokens for record in records) / (time.perf_counter() - began)


async def measure(urls: Sequence[str], texts: Texts, requests: int, repeats: int) -> None:
    """Print a row for each cell; `urls` are the server with the cache and the one without."""
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        with Progress(transient=True) as progress:
            bar = progress.add_task("measuring", total=len(CELLS) * repeats)
            for cell in CELLS:
                await asyncio.gather(
                    *(one_request(session, url, texts.next(cell), cell.model, 2) for url in urls)
                )
                ttft: list[list[float]] = []
                rate: list[list[float]] = []
                for _ in range(repeats):
                    asked = [texts.next(cell) for _ in range(requests)]
                    ttft.append([await alone(session, url, cell, asked) for url in urls])
                    asked = [texts.next(cell) for _ in range(2 * CLIENTS)]
                    rate.append([await together(session, url, cell, asked) for url in urls])
                    progress.advance(bar)
                print(row(cell, ttft, rate), flush=True)


def row(cell: Cell, ttft: Sequence[Sequence[float]], rate: Sequence[Sequence[float]]) -> str:
    first, tokens = (
        [statistics.median(side) for side in zip(*both, strict=True)] for both in (ttft, rate)
    )
    return (
        f"| {'begin alike' if cell.shared else 'all different'} | {cell.model} "
        f"| {first[0]:.0f} | {first[1]:.0f} | {first[1] / first[0]:.2f} "
        f"| {tokens[0]:.0f} | {tokens[1]:.0f} | {tokens[0] / tokens[1]:.2f} |"
    )


def fill_registry(home: Path, base: BaseModel, bases: Bases) -> None:
    with Registry.open(home, bases) as registry:
        write_adapter(home / "made", base, seed=1)
        pushed = registry.push(home / "made", NAME, actor="benchmark")
        registry.promote(NAME, pushed.version.number, reason="benchmark", actor="benchmark")


def setup_line(base: BaseModel, tokens: int, repeats: int) -> str:
    return (
        f"{os.cpu_count()} cores of {cpu_name()}, base {base.id}, {tokens} tokens in common and a "
        f"question of 30–60, medians of {repeats}, {time.strftime('%F')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=1000, help="of the common beginning")
    parser.add_argument("--requests", type=int, default=16, help="one after the other, a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    count = len(CELLS) * (args.repeats * (args.requests + 2 * CLIENTS) + 2)
    texts = Texts(str(base.path), args.tokens, count)
    with contextlib.ExitStack() as stack:
        urls = []
        for extra in ((), NO_PREFIX_CACHE):
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wardrobe-bench-")))
            fill_registry(home, base, bases)
            serve = running_server(home, base.id, ["--no-auth", *extra, *args.serve])
            urls.append(stack.enter_context(serve))
        print(f"{setup_line(base, args.tokens, args.repeats)}\n\n{HEAD}", flush=True)
        asyncio.run(measure(urls, texts, args.requests, args.repeats))


if __name__ == "__main__":
    main()
