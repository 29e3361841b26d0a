"""Output tokens per second, time to first token and inter-token times, over HTTP.

    python -m benchmarks.throughput [--repeats 3] [--cells 8,8;32,32] [--plot FILE]

Makes a throw-away registry with 32 random rank-16 adapters on all seven linears, starts
`wardrobe serve` on a free loopback port, drives it with a closed loop of streaming clients on the
same machine (they take their share of the cores), prints one Markdown table and ends the server.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import aiohttp
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from benchmarks.plots import Bar, Plot, add_option, draw_bars
from benchmarks.workload import CELLS, OUTPUT_TOKENS, Cell, Figures, Record, prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry

ADAPTERS = 32
RANK = 16


def write_adapter(folder: Path, base: BaseModel, seed: int) -> None:
    """Write a random adapter; its B is not zero, so wearing it changes the output."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for module, (out_features, in_features) in base.linears.items():
        if ".layers." not in module:
            continue
        key = f"base_model.model.{module}"
        a = torch.randn(RANK, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, RANK, generator=generator) * 0.01
        tensors[f"{key}.lora_A.weight"] = a.bfloat16()
        tensors[f"{key}.lora_B.weight"] = b.bfloat16()
    targets = sorted({key.split(".")[-3] for key in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": targets,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def fill_registry(home: Path, base: BaseModel, bases: Bases) -> None:
    with Registry.open(home, bases) as registry, Progress(transient=True) as progress:
        for i in progress.track(range(ADAPTERS), description="making adapters"):
            name = AdapterName.parse(f"bench/a{i:02d}")
            folder = home / "made" / name.name
            write_adapter(folder, base, seed=1000 + i)
            pushed = registry.push(folder, name, actor="benchmark")
            registry.promote(name, pushed.version.number, reason="benchmark", actor="benchmark")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# For benchmarks whose prompts come again, though they measure something else.
NO_PREFIX_CACHE = ("--prefix-cache-memory", "0")


@contextlib.contextmanager
def running_server(home: Path, base_id: str, extra: list[str]) -> Iterator[str]:
    """Start `wardrobe serve`, wait until it is ready, end it afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "wardrobe", "serve", "--home", str(home), "--base", base_id]
    command += ["--port", str(port), *extra]
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: S603 - our own command
    try:
        failure = asyncio.run(wait_ready(f"http://127.0.0.1:{port}", server))
        if failure:
            raise SystemExit(f"{failure}:\n{(home / 'server.log').read_text()[-2000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


async def wait_ready(url: str, server: subprocess.Popen[bytes]) -> str:
    """Return "" when the server answers, else what went wrong."""
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            if server.poll() is not None:
                return "the server ended at start"
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health/ready") as answer:
                    if answer.status == 200:
                        return ""
            await asyncio.sleep(0.1)
    return "the server was not ready in 60 s"


class Refused(RuntimeError):
    """The server had no room for the request (429)."""


async def one_request(
    session: aiohttp.ClientSession, url: str, prompt: list[int], model: str, max_tokens: int
) -> Record:
    """Stream one completion; anything but a clean stream of all its tokens raises."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    record = Record(time.perf_counter())
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status == 429:
            raise Refused(await answer.text())
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:200]}")
        async for line in answer.content:
            if not line.startswith(b"data: {"):
                continue
            now, event = time.perf_counter(), json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error event: {event['error']}")
            if event.get("usage"):
                record.tokens = event["usage"]["completion_tokens"]
            if event["choices"] and not event["choices"][0]["finish_reason"]:
                record.events.append(now)
    if record.tokens != max_tokens:
        raise RuntimeError(f"{record.tokens} tokens came, {max_tokens} were asked for")
    return record


def model_name(i: int, adapters: int) -> str:
    return "base" if adapters == 0 else f"bench/a{i % adapters:02d}"


async def run_cell(
    session: aiohttp.ClientSession, url: str, cell: Cell, texts: list[list[int]]
) -> Figures:
    jobs = iter(range(cell.requests))
    records: list[Record] = []

    async def client() -> None:
        for i in jobs:
            model = model_name(i, cell.adapters)
            records.append(await one_request(session, url, texts[i], model, OUTPUT_TOKENS))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(cell.clients)))
    return Figures.of(records, time.perf_counter() - began)


async def measure(
    url: str, cells: list[Cell], repeats: int, pool: list[list[int]]
) -> dict[Cell, list[Figures]]:
    """Run every cell `repeats` times with fresh prompts, after touching every adapter once."""
    figures: dict[Cell, list[Figures]] = {cell: [] for cell in cells}
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for i in range(max(c.adapters for c in cells) or 1):
            await one_request(session, url, pool[i], model_name(i, ADAPTERS), 4)
        clients = max(c.clients for c in cells)
        used = max(ADAPTERS, clients)  # a prompt that comes again is found in the prefix cache
        await asyncio.gather(
            *(one_request(session, url, pool[i], "base", 16) for i in range(clients))
        )
        with Progress() as progress:
            bar = progress.add_task("measuring", total=repeats * len(cells))
            for _ in range(repeats):
                for cell in cells:
                    texts = pool[used : used + cell.requests]
                    figures[cell].append(await run_cell(session, url, cell, texts))
                    used += cell.requests
                    progress.advance(bar)
    return figures


def table(figures: dict[Cell, list[Figures]]) -> str:
    lines = [
        "| C | adapters | tok/s (min–max) | TTFT p50 ms | p99 | ITL p50 ms | p95 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, repeats in figures.items():
        m = Figures.median(repeats)
        rates = [r.tokens_per_second for r in repeats]
        lines.append(
            f"| {cell.clients} | {cell.adapters} | {m.tokens_per_second:.0f} "
            f"({min(rates):.0f}–{max(rates):.0f}) | {m.ttft_p50:.0f} | {m.ttft_p99:.0f} "
            f"| {m.itl_p50:.1f} | {m.itl_p95:.1f} | {m.itl_p99:.1f} |"
        )
    return "\n".join(lines)


def label(cell: Cell) -> str:
    clients = "1 client" if cell.clients == 1 else f"{cell.clients} clients"
    adapters = {0: "base", 1: "1 adapter"}.get(cell.adapters, f"{cell.adapters} adapters")
    return f"{clients}, {adapters}"


def draw_rates(figures: dict[Cell, list[Figures]], plot: Plot) -> None:
    rates = {cell: [r.tokens_per_second for r in repeats] for cell, repeats in figures.items()}
    groups = {label(cell): {"wardrobe": Bar.of(each)} for cell, each in rates.items()}
    draw_bars(plot, "output tokens a second", groups)


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def setting(base: BaseModel) -> str:
    return (
        f"{os.cpu_count()} cores of {cpu_name()}, torch {torch.__version__}, base {base.id}, "
        f"rank {RANK} on 7 linears, 112–144 prompt tokens, {OUTPUT_TOKENS} output tokens, over "
        "HTTP with the clients on the same cores"
    )


def setup_line(base: BaseModel, repeats: int) -> str:
    return f"{setting(base)}, medians of {repeats}, {time.strftime('%F')}"


def parse_cells(text: str) -> list[Cell]:
    if not text:
        return list(CELLS)
    wanted = {tuple(int(x) for x in pair.split(",")) for pair in text.split(";")}
    cells = [c for c in CELLS if (c.clients, c.adapters) in wanted]
    if len(cells) != len(wanted):
        known = "; ".join(f"{c.clients},{c.adapters}" for c in CELLS)
        raise SystemExit(f"--cells {text!r}: known cells are {known}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", default="", help="clients,adapters;… (default: all nine)")
    parser.add_argument("--out", type=Path, help="also write every repeat as JSON")
    add_option(parser)
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    cells = parse_cells(args.cells)
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = Path(folder)
        fill_registry(home, base, bases)
        count = 2 * ADAPTERS + args.repeats * sum(cell.requests for cell in cells)
        pool = prompts(str(base.path), count, seed=0)
        with running_server(home, base.id, ["--no-auth", *args.serve]) as url:
            figures = asyncio.run(measure(url, cells, args.repeats, pool))
    print(f"\n{setup_line(base, args.repeats)}\n\n{table(figures)}")
    if args.plot:
        draw_rates(figures, Plot(args.plot, setup_line(base, args.repeats)))
    if args.out:
        rows = [
            asdict(cell) | {"repeat": i} | asdict(repeat)
            for cell, repeats in figures.items()
            for i, repeat in enumerate(repeats)
        ]
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
