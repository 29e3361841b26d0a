"""Does one tenant's flood make the others wait? Times to first token over HTTP.

    python -m benchmarks.fairness [--seconds 60] [--repeats 2] [--one-tenant]

Five tenants, each with a key and an adapter of its own, on one server. First it is measured how
many requests a second the server answers when there are always enough; a fifth of that is a
tenant's share. Then two phases take turns: in both, four tenants send at random times, each at half
its share; the fifth does the same (quiet), or sends a hundred times its share (noisy). In a last
phase everybody asks for more than there is, and Jain's index says how equal the tokens are.
`--one-tenant` sends everything under one key, as first come, first served: what it would be
without shares.
"""

import argparse
import asyncio
import contextlib
import math
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from rich.progress import Progress

from benchmarks.plots import Plot, add_option, draw_dots
from benchmarks.throughput import (
    NO_PREFIX_CACHE,
    Refused,
    one_request,
    running_server,
    setup_line,
    write_adapter,
)
from benchmarks.workload import Record, jain, percentile, prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry
from serving.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT
from serving.tenants.keys import INFER, add_key

OTHERS = ("one", "two", "three", "four")
NOISY = "noisy"
TENANTS = (*OTHERS, NOISY)
OUTPUT_TOKENS = 64
IN_FLIGHT = 32  # enough for a full batch
FLOOD = 100  # times its share
OF_SHARE = 0.5  # what the others send


@dataclass(slots=True)
class Phase:
    """What happened in one phase."""

    records: dict[str, list[Record]] = field(default_factory=lambda: {t: [] for t in TENANTS})
    served: Counter[str] = field(default_factory=Counter[str])  # weighted tokens
    refused: Counter[str] = field(default_factory=Counter[str])

    def ttft(self) -> list[float]:
        """Return the others' milliseconds to the first token."""
        records = [record for tenant in OTHERS for record in self.records[tenant]]
        return [(record.events[0] - record.sent) * 1e3 for record in records]


class Load:
    """Sends requests of every tenant to one server."""

    def __init__(
        self, url: str, sessions: dict[str, aiohttp.ClientSession], pool: list[list[int]]
    ) -> None:
        self._url, self._sessions, self._pool = url, sessions, pool
        self._random = random.Random(1)

    async def one(self, tenant: str, phase: Phase) -> bool:
        """Send one request; tell whether it was answered."""
        prompt = self._random.choice(self._pool)
        try:
            record = await one_request(
                self._sessions[tenant], self._url, prompt, f"{tenant}/a", OUTPUT_TOKENS
            )
        except Refused:
            phase.refused[tenant] += 1
            return False
        phase.records[tenant].append(record)
        phase.served[tenant] += PROMPT_WEIGHT * len(prompt) + OUTPUT_WEIGHT * record.tokens
        return True

    async def keep(self, tenant: str, phase: Phase) -> None:
        """Send one after the other for ever, and wait a second where there is no room."""
        while True:
            if not await self.one(tenant, phase):
                await asyncio.sleep(1)

    async def at_random(self, tenant: str, phase: Phase, rate: float) -> None:
        """Send `rate` requests a second, whether or not the earlier ones have been answered."""
        async with asyncio.TaskGroup() as sent:
            while True:
                await asyncio.sleep(self._random.expovariate(rate))
                sent.create_task(self.one(tenant, phase))

    async def run(self, seconds: float, *flows: Coroutine[Any, Any, None]) -> None:
        """Run the flows side by side, then break them all off and let the server notice."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*flows)
        await asyncio.sleep(2)

    async def capacity(self, seconds: float) -> float:
        """Return the requests a second that are answered when there are always enough."""
        phase = Phase()
        await self.run(seconds, *(self.keep(NOISY, phase) for _ in range(IN_FLIGHT)))
        ends = sorted(record.events[-1] for record in phase.records[NOISY])
        if len(ends) < IN_FLIGHT:
            raise SystemExit(f"Only {len(ends)} answers in {seconds:.0f} s: give --seconds more.")
        return (len(ends) - 1) / (ends[-1] - ends[0])

    async def beside(self, seconds: float, share: float, noise: float) -> Phase:
        """Return a phase in which the noisy tenant sends `noise` times its share."""
        phase = Phase()
        others = (self.at_random(tenant, phase, OF_SHARE * share) for tenant in OTHERS)
        await self.run(seconds, *others, self.at_random(NOISY, phase, noise * share))
        return phase

    async def crowded(self, seconds: float) -> Phase:
        """Return a phase in which everybody asks for more than its share, one for far more."""
        phase = Phase()
        flows = [self.keep(tenant, phase) for tenant in OTHERS for _ in range(IN_FLIGHT // 2)]
        flows += [self.keep(NOISY, phase) for _ in range(4 * IN_FLIGHT)]
        await self.run(seconds, *flows)
        return phase


def fill_registry(home: Path, base: BaseModel, bases: Bases, *, one_tenant: bool) -> dict[str, str]:
    """Give every tenant an adapter, and return their keys."""
    with Registry.open(home, bases) as registry:
        for number, tenant in enumerate(TENANTS):
            name = AdapterName.parse(f"{tenant}/a")
            write_adapter(home / "made" / tenant, base, seed=2000 + number)
            pushed = registry.push(home / "made" / tenant, name, actor="benchmark")
            registry.promote(name, pushed.version.number, reason="benchmark", actor="benchmark")
            if one_tenant and tenant != NOISY:
                registry.share(name, NOISY)
        owners = [NOISY if one_tenant else tenant for tenant in TENANTS]
        return {
            tenant: add_key(registry, owner, (INFER,))
            for tenant, owner in zip(TENANTS, owners, strict=True)
        }


@dataclass(frozen=True, slots=True)
class Result:
    share: float  # requests a second of a tenant
    quiet: list[Phase]
    noisy: list[Phase]
    crowded: Phase


@contextlib.asynccontextmanager
async def signed_in(keys: dict[str, str]) -> AsyncIterator[dict[str, aiohttp.ClientSession]]:
    """Open a session for each tenant."""
    async with contextlib.AsyncExitStack() as stack:
        yield {
            tenant: await stack.enter_async_context(
                aiohttp.ClientSession(
                    headers={"authorization": f"Bearer {key}"},
                    timeout=aiohttp.ClientTimeout(total=600),
                    connector=aiohttp.TCPConnector(limit=0),
                )
            )
            for tenant, key in keys.items()
        }


async def measure(
    url: str, keys: dict[str, str], pool: list[list[int]], seconds: float, repeats: int
) -> Result:
    async with signed_in(keys) as sessions:
        load = Load(url, sessions, pool)
        for tenant in TENANTS:
            await load.one(tenant, Phase())
        with Progress() as progress:
            bar = progress.add_task("measuring", total=2 * repeats + 2)
            share = await load.capacity(seconds) / len(TENANTS)
            progress.advance(bar)
            quiet, noisy = [], []
            for _ in range(repeats):
                for phases, noise in ((quiet, OF_SHARE), (noisy, FLOOD)):
                    phases.append(await load.beside(seconds, share, noise))
                    progress.advance(bar)
            crowded = await load.crowded(seconds / 2)
            progress.advance(bar)
    return Result(share, quiet, noisy, crowded)


def report(result: Result) -> str:
    quiet, noisy, crowded = result.quiet, result.noisy, result.crowded
    lines = [
        f"A tenant's share is {result.share:.2f} requests a second.",
        "",
        "| others' time to first token | answered | p50 ms | p99 ms | refused |",
        "|---|---|---|---|---|",
    ]
    tails: list[float] = []
    for name, phases in (("quiet", quiet), ("noisy", noisy)):
        ttft = [value for phase in phases for value in phase.ttft()] or [math.nan]
        refused = sum(phase.refused[tenant] for phase in phases for tenant in OTHERS)
        answered = sum(len(phase.records[tenant]) for phase in phases for tenant in OTHERS)
        tails.append(percentile(ttft, 99))
        lines.append(
            f"| {name} | {answered} | {percentile(ttft, 50):.0f} | {tails[-1]:.0f} | {refused} |"
        )
    answered = sum(len(phase.records[NOISY]) for phase in noisy)
    refused = sum(phase.refused[NOISY] for phase in noisy)
    served = [crowded.served[tenant] for tenant in TENANTS]
    lines += [
        "",
        f"p99 noisy ÷ quiet: {tails[1] / tails[0]:.2f}. The noisy tenant was answered {answered} "
        f"times and refused {refused} times.",
        f"Jain's index of tokens, everybody asking for more than there is: "
        f"{jain(served) if any(served) else math.nan:.3f}",
    ]
    return "\n".join(lines)


def draw_waits(result: Result, plot: Plot) -> None:
    phases = {"quiet": result.quiet, "noisy": result.noisy}
    rows = {name: [t for phase in each for t in phase.ttft()] for name, each in phases.items()}
    draw_dots(plot, "others' time to first token, ms", {n: v for n, v in rows.items() if v})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seconds", type=float, default=60, help="of each phase")
    parser.add_argument("--repeats", type=int, default=2)
    add_option(parser)
    parser.add_argument("--one-tenant", action="store_true", help="the control: no shares")
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = Path(folder)
        keys = fill_registry(home, base, bases, one_tenant=args.one_tenant)
        pool = prompts(str(base.path), 400, seed=0)
        with running_server(home, base.id, [*NO_PREFIX_CACHE, *args.serve]) as url:
            result = asyncio.run(measure(url, keys, pool, args.seconds, args.repeats))
    print(f"\n{setup_line(base, args.repeats)}\n\n{report(result)}")
    if args.plot:
        draw_waits(result, Plot(args.plot, setup_line(base, args.repeats)))


if __name__ == "__main__":
    main()
