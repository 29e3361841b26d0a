"""Ten thousand registered adapters, a few of which everybody wants: throughput by adapter memory.

    python -m benchmarks.scale [--adapters 10000] [--requests 256] [--zipf 1.0] [--repeats 3]
        [--home DIR] [--plot FILE]

Adapter number k is asked for with a probability that falls as 1 / k^zipf. Clients in a closed loop
send the same requests to servers with memory for all adapters that the requests name, for half of
them, and so on; each server gets as many requests to one adapter alone before, as the control, and
both again in every repeat.
Before a phase every adapter of it is touched once, the least popular first, so that what is
measured is traffic and not a cold start.

Adapters that the requests do not name are registered too, and are made small: nothing reads them.
`--home` keeps what was made (minutes) for the next time.
"""

import argparse
import asyncio
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import torch
from rich.progress import Progress
from safetensors.torch import save_file

from benchmarks.floor import SIZE, Sizes
from benchmarks.plots import Bar, Plot, add_option, draw_bars
from benchmarks.throughput import (
    NO_PREFIX_CACHE,
    one_request,
    running_server,
    setup_line,
    write_adapter,
)
from benchmarks.workload import OUTPUT_TOKENS, Figures, Record, prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry

SHARES = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True, slots=True)
class Phase:
    """What one memory size gave, once."""

    room: int  # adapters of rank 16 that memory holds
    distinct: int  # adapters that were asked for
    loads: int  # into slots, while it was measured
    figures: Figures


Pair = tuple[Phase, Phase]  # one adapter alone, then all that are asked for


def name_of(number: int) -> AdapterName:
    return AdapterName.parse(f"bench/a{number:05d}")


def draw(adapters: int, requests: int, exponent: float) -> list[int]:
    """Return which adapter each request wears; the same arguments give the same numbers."""
    weights = [1 / k**exponent for k in range(1, adapters + 1)]
    return random.Random(0).choices(range(adapters), weights, k=requests)


def fill_registry(
    home: Path, base: BaseModel, bases: Bases, adapters: int, asked: set[int]
) -> None:
    """Register what is not there yet."""
    with Registry.open(home, bases) as registry, Progress() as progress:
        there = {alias.name for alias in registry.all_aliases()}
        for number in progress.track(range(adapters), description="registering"):
            name = name_of(number)
            if name in there:
                continue
            folder = home / "made"
            shutil.rmtree(folder, ignore_errors=True)
            if number in asked:
                write_adapter(folder, base, seed=5000 + number)
            else:
                write_small(folder, base, seed=5000 + number)
            pushed = registry.push(folder, name, actor="benchmark")
            registry.promote(name, pushed.version.number, reason="benchmark", actor="benchmark")


def write_small(folder: Path, base: BaseModel, seed: int) -> None:
    """Write an adapter of one linear and rank 1."""
    module, (out_features, in_features) = min(base.linears.items())
    generator = torch.Generator().manual_seed(seed)
    key = f"base_model.model.{module}"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(1, in_features, generator=generator),
        f"{key}.lora_B.weight": torch.randn(out_features, 1, generator=generator),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": [module],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Traffic:
    """Clients in a closed loop over one list of requests."""

    def __init__(self, pool: Sequence[list[int]], clients: int) -> None:
        self._pool, self._clients = pool, clients

    async def phase(self, url: str, room: int, numbers: Sequence[int]) -> Phase:
        timeout = aiohttp.ClientTimeout(total=600)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            popular = [number for number, _ in Counter(numbers).most_common()]
            await self._send(session, url, popular[::-1], 1)
            loads = await loads_of(session, url)
            began = time.perf_counter()
            records = await self._send(session, url, numbers, OUTPUT_TOKENS)
            figures = Figures.of(records, time.perf_counter() - began)
            loads = await loads_of(session, url) - loads
        return Phase(room, len(popular), loads, figures)

    async def _send(
        self, session: aiohttp.ClientSession, url: str, numbers: Sequence[int], tokens: int
    ) -> list[Record]:
        jobs = iter(enumerate(numbers))
        records: list[Record] = []

        async def client() -> None:
            for i, number in jobs:
                prompt = self._pool[i % len(self._pool)]
                name = str(name_of(number))
                records.append(await one_request(session, url, prompt, name, tokens))

        await asyncio.gather(*(client() for _ in range(self._clients)))
        return records


async def loads_of(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(f"{url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next(int(float(x.split()[1])) for x in lines if x.startswith("wardrobe_adapter_loads_t"))


def measure(
    home: Path,
    base: BaseModel,
    numbers: Sequence[int],
    traffic: Traffic,
    shares: Sequence[float],
    repeats: int,
    serve: list[str],
) -> list[list[Pair]]:
    """Serve once for each memory size, and return the repeats of each."""
    found: list[list[Pair]] = []
    distinct, size = len(set(numbers)), SIZE * Sizes.read(base.path).adapter
    with Progress() as progress:
        bar = progress.add_task("measuring", total=2 * repeats * len(shares))

        def phase(url: str, room: int, wanted: Sequence[int]) -> Phase:
            done = asyncio.run(traffic.phase(url, room, wanted))
            progress.advance(bar)
            return done

        for share in shares:
            room = max(1, round(share * distinct))
            memory = f"{math.ceil(room * size / (1 << 20))}MiB"
            options = ["--no-auth", *NO_PREFIX_CACHE, "--adapter-memory", memory, *serve]
            with running_server(home, base.id, options) as url:
                found.append(
                    [
                        (phase(url, room, [0] * len(numbers)), phase(url, room, numbers))
                        for _ in range(repeats)
                    ]
                )
    return found


def ratios(pairs: Sequence[Pair]) -> list[float]:
    return [
        phase.figures.tokens_per_second / alone.figures.tokens_per_second for alone, phase in pairs
    ]


def report(found: Sequence[Sequence[Pair]]) -> str:
    lines = [
        "| room for | asked for | loads | tok/s | one adapter's | ratio (min–max) | TTFT p50 ms "
        "| p99 | ITL p50 ms | p95 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pairs in found:
        _, phase = pairs[0]
        one = Figures.median([alone.figures for alone, _ in pairs]).tokens_per_second
        f, each = Figures.median([phase.figures for _, phase in pairs]), ratios(pairs)
        loads = statistics.median(phase.loads for _, phase in pairs)
        lines.append(
            f"| {phase.room} | {phase.distinct} | {loads:.0f} | {f.tokens_per_second:.0f} "
            f"| {one:.0f} | {statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f}) "
            f"| {f.ttft_p50:.0f} | {f.ttft_p99:.0f} | {f.itl_p50:.1f} | {f.itl_p95:.1f} |"
        )
    return "\n".join(lines)


def draw_rates(found: Sequence[Sequence[Pair]], plot: Plot) -> None:
    groups: dict[str, dict[str, Bar]] = {}
    for pairs in found:
        _, phase = pairs[0]
        note = f"  ({statistics.median(ratios(pairs)):.2f} of one's)"
        groups[f"room for {phase.room} of {phase.distinct}"] = {
            "one adapter": Bar.of([alone.figures.tokens_per_second for alone, _ in pairs]),
            "all": Bar.of([each.figures.tokens_per_second for _, each in pairs], note),
        }
    draw_bars(plot, "output tokens a second", groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="of the adapters that are asked for: how many memory holds",
    )
    parser.add_argument("--repeats", type=int, default=3)
    add_option(parser)
    parser.add_argument("--home", type=Path, help="keep the registry that is made here")
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    numbers = draw(args.adapters, args.requests, args.zipf)
    traffic = Traffic(prompts(str(base.path), 400, seed=0), args.clients)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = args.home or Path(folder)
        fill_registry(home, base, bases, args.adapters, {0, *numbers})
        found = measure(home, base, numbers, traffic, args.shares, args.repeats, args.serve)
    print(f"\n{setup_line(base, args.repeats)}")
    traffic_line = f"{args.adapters} adapters registered, {args.clients} clients, Zipf {args.zipf}"
    print(f"{traffic_line}\n\n{report(found)}")
    if args.plot:
        draw_rates(found, Plot(args.plot, f"{setup_line(base, args.repeats)}; {traffic_line}"))


if __name__ == "__main__":
    main()
