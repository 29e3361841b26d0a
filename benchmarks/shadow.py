"""What a shadow costs production: latency with it on, divided by latency with it off, in one run.

One server, two versions of one adapter over a real base, clients in a closed loop that all ask for
production. Blocks with the shadow on and off take turns, so that what else the machine does hits
both alike.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import aiohttp
from rich.progress import Progress

from benchmarks.throughput import (
    NO_PREFIX_CACHE,
    one_request,
    running_server,
    setup_line,
    write_adapter,
)
from benchmarks.workload import OUTPUT_TOKENS, Record, percentile, prompts
from registry.adapter import AdapterName
from registry.base import BaseModel, Bases
from registry.home import default_cache
from registry.store import Registry

NAME = AdapterName("bench", "shadowed")
PATH = f"/v1/adapters/{NAME}/shadow"
TAKE_UP_SECONDS = 3.0  # from start or stop until the server has followed, with a margin


def fill_registry(home: Path, base: BaseModel, bases: Bases) -> None:
    """Push two versions; the first is production."""
    with Registry.open(home, bases) as registry:
        for number in (1, 2):
            folder = home / "made" / str(number)
            write_adapter(folder, base, seed=number)
            registry.push(folder, NAME, actor="benchmark")
        registry.promote(NAME, 1, reason="benchmark", actor="benchmark")


async def run_block(
    session: aiohttp.ClientSession, url: str, texts: Sequence[list[int]], clients: int
) -> list[Record]:
    """Ask for every prompt, `clients` at a time; return the records with their ends."""
    jobs = iter(texts)
    records: list[Record] = []

    async def client() -> None:
        for text in jobs:
            record = await one_request(session, url, text, str(NAME), OUTPUT_TOKENS)
            records.append(record)

    await asyncio.gather(*(client() for _ in range(clients)))
    return records


async def switch(session: aiohttp.ClientSession, url: str, share: float | None) -> None:
    """Start a shadow with this share, or stop it, and wait until the server has followed."""
    body = {"reason": "benchmark"} if share is None else {"candidate": "@v2", "share": share}
    path = f"{PATH}/stop" if share is None else PATH
    async with session.post(url + path, json=body) as answer:
        if answer.status not in (200, 201):
            raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:200]}")
    await asyncio.sleep(TAKE_UP_SECONDS)


async def measure(
    url: str, args: argparse.Namespace, pool: list[list[int]]
) -> tuple[dict[bool, list[Record]], dict[str, int]]:
    """Return shadow on or off → records, and what became of the requests that were chosen."""
    records: dict[bool, list[Record]] = {False: [], True: []}
    told: dict[str, int] = {}
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await run_block(session, url, pool[: args.clients], args.clients)
        with Progress() as progress:
            bar = progress.add_task("measuring", total=2 * args.blocks)
            for block in range(2 * args.blocks):
                # off on on off off on …: what drifts steadily hits both alike
                on = block % 4 in (1, 2)
                texts = [
                    pool[(block * args.requests + i) % len(pool)] for i in range(args.requests)
                ]
                if on:
                    await switch(session, url, args.share)
                records[on] += await run_block(session, url, texts, args.clients)
                if on:
                    await switch(session, url, None)
                    async with session.get(url + PATH) as answer:
                        facts = json.loads(await answer.read())
                    for why, count in {"pairs": facts["pairs"], **facts["skipped"]}.items():
                        told[why] = told.get(why, 0) + count
                progress.advance(bar)
    return records, told


def table(records: dict[bool, list[Record]]) -> str:
    lines = ["| | off | on | on ÷ off |", "|---|---|---|---|"]
    measures = {
        "first token": lambda record: record.events[0] - record.sent,
        "whole answer": lambda record: record.events[-1] - record.sent,
    }
    for name, of in measures.items():
        for q in (50, 95):
            off, on = (percentile([of(r) for r in records[side]], q) for side in (False, True))
            lines.append(
                f"| {name}, p{q} | {1e3 * off:.0f} ms | {1e3 * on:.0f} ms | {on / off:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--share", type=float, default=0.1, help="of the requests are mirrored")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument(
        "--blocks", type=int, default=4, help="with the shadow, and as many without"
    )
    parser.add_argument("--requests", type=int, default=40, help="in a block")
    parser.add_argument("serve", nargs="*", help="after --: options handed to `wardrobe serve`")
    args = parser.parse_args()
    bases = Bases(default_cache() / "bases")
    base = bases.get(args.base)
    with tempfile.TemporaryDirectory(prefix="wardrobe-shadow-") as folder:
        home = Path(folder)
        fill_registry(home, base, bases)
        pool = prompts(str(base.path), 400, seed=0)
        serve = ["--no-auth", *NO_PREFIX_CACHE, *args.serve]
        with running_server(home, base.id, serve) as url:
            records, told = asyncio.run(measure(url, args, pool))
    mirrored = ", ".join(f"{count} {why}" for why, count in sorted(told.items()))
    print(f"\n{setup_line(base, args.blocks)}\n\n{table(records)}\n")
    print(
        f"{args.clients} clients, share {args.share:g}: {len(records[True])} requests with the "
        f"shadow on, {len(records[False])} with it off; of those chosen: {mirrored}"
    )


if __name__ == "__main__":
    main()
