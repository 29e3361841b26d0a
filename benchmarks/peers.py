"""The workload of `throughput` against this server and against others, in one run.

    python -m benchmarks.peers [--cells "8,0;32,0;8,8;32,32"] [--repeats 3] \
        --peer 'vllm=env OMP_NUM_THREADS=2 /opt/vllm/bin/vllm serve {base} \
            --served-model-name base --port {port}' \
        --lora-peer 'vllm with adapters=… --lora-modules {adapters}'

A peer is any command that serves `/v1/completions` for the model `base`: `{base}` is its folder,
`{port}` where it has to listen, `{adapters}` are 32 words name=folder, as vLLM takes them. `--peer`
runs the cells without adapters, `--lora-peer` those with adapters. Ours has no prefix cache: no
prompt comes again, and peers should be without one, too. All servers are up, and every
cell goes round them in turn, so that what else the machine does meets all alike; a peer whose turn
it is not is stopped (SIGSTOP), because some wait by spinning.
A round (one cell, once on every server) is written to `--results` when it is complete; the same
command goes on where it was stopped, and `--minutes` stops it. Prints one Markdown table: rates,
times, how many times as fast as the peer we are, and the share of the floor (benchmarks/floor.py),
whose limits are measured before each server's turn: a host's speed may change within minutes.
A peer that is missing, or does not start, is said and left out.
"""

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.floor import Limits, Sizes, floor
from benchmarks.journal import Journal
from benchmarks.peer_servers import Peer, Server, turn, up
from benchmarks.plots import Bar, Plot, add_option, draw_bars
from benchmarks.throughput import (
    ADAPTERS,
    fill_registry,
    label,
    model_name,
    one_request,
    parse_cells,
    run_cell,
    setting,
)
from benchmarks.workload import Cell, Figures, prompts
from registry.base import BaseModel, Bases
from registry.home import default_cache

OURS = "wardrobe"


Round = tuple[Cell, int]  # and its number


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's part of a round, and what the machine reached just before."""

    figures: Figures
    limits: Limits

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> "Turn":
        rates = {int(rows): rate for rows, rate in entry["limits"]["rates"].items()}
        return cls(Figures(**entry["figures"]), Limits(entry["limits"]["read"], rates))

    def share(self, cell: Cell, sizes: Sizes) -> float:
        """Return the rate over the floor's."""
        return self.figures.tokens_per_second / floor(cell, sizes, self.limits)


class Results:
    """What complete rounds gave, in this run and in earlier ones."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self.setting = journal, journal.setting
        self.turns: dict[Round, dict[str, Turn]] = {}
        for entry in journal:
            if "figures" not in entry or "limits" not in entry:
                raise SystemExit(
                    f"{journal.path} is of an older form of this benchmark, which measured limits "
                    "once. Name another file with --results."
                )
            known = self.turns.setdefault((Cell(**entry["cell"]), entry["repeat"]), {})
            known[entry["server"]] = Turn.read(entry)

    def add(self, cell: Cell, repeat: int, turns: dict[str, Turn]) -> None:
        self.turns[cell, repeat] = turns
        place = {"cell": asdict(cell), "repeat": repeat}
        self._journal.write(
            *(place | {"server": name} | asdict(own) for name, own in turns.items())
        )

    def missing(self, wanted: Sequence[Round], peers: Sequence[Peer]) -> list[Round]:
        """Return the rounds that lack a server that runs their cell."""
        return [
            (cell, repeat)
            for cell, repeat in wanted
            for known in [self.turns.get((cell, repeat), {})]
            if not all(peer.name in known for peer in peers if peer.runs(cell))
        ]

    def of(self, cell: Cell, name: str) -> list[Turn]:
        rounds = [known for (own, _), known in self.turns.items() if own == cell]
        return [known[name] for known in rounds if name in known]

    def limits(self) -> str:
        """Return what the machine reached, from turn to turn."""
        all_limits = [own.limits for known in self.turns.values() for own in known.values()]
        if not all_limits:
            return "none measured"
        rates = (
            f"{_span([each.rates[rows] / 1e9 for each in all_limits], 0)} at {rows} rows"
            for rows in all_limits[0].rates
        )
        read = _span([each.read / 1e9 for each in all_limits], 1)
        return f"{read} GB/s read; bfloat16 GFLOP/s: {', '.join(rates)}"


def _span(values: Sequence[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


async def touch(server: Server) -> None:
    """Have every adapter loaded that a cell may name."""
    count = ADAPTERS if True in server.peer.adapters else 0
    async with turn(server) as session:
        for i in range(count or 1):
            await one_request(session, server.url, [1 + i, 2, 3], model_name(i, count), 4)


async def measure(
    servers: Sequence[Server],
    missing: Sequence[Round],
    texts: dict[Round, list[list[int]]],
    results: Results,
    until: float,
) -> bool:
    """Run the rounds, every second one the other way round; tell whether the time sufficed."""
    for server in servers:
        await touch(server)
    with Progress() as progress:
        bar = progress.add_task("measuring", total=len(missing))
        for cell, repeat in missing:
            if time.monotonic() > until:
                return False
            here = [server for server in servers if server.peer.runs(cell)]
            turns: dict[str, Turn] = {}
            for server in here if repeat % 2 == 0 else reversed(here):
                limits = Limits.measure()
                async with turn(server) as session:
                    own = await run_cell(session, server.url, cell, texts[cell, repeat])
                turns[server.peer.name] = Turn(own, limits)
            results.add(cell, repeat, turns)
            progress.advance(bar)
    return True


def table(results: Results, peers: Sequence[Peer], cells: Sequence[Cell], sizes: Sizes) -> str:
    lines = [
        "| C | adapters | server | tok/s (min–max) | TTFT p50 ms | ITL p50 ms | p95 | p99 "
        "| wardrobe ÷ it | of the floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        own = results.of(cell, OURS)
        for peer in peers if own else ():
            if peer.runs(cell) and (turns := results.of(cell, peer.name)):
                m = Figures.median([each.figures for each in turns])
                ours = Figures.median([each.figures for each in own])
                rate = _span([each.figures.tokens_per_second for each in turns], 0)
                share = statistics.median(each.share(cell, sizes) for each in turns)
                lines.append(
                    f"| {cell.clients} | {cell.adapters} | {peer.name} | {rate} "
                    f"| {m.ttft_p50:.0f} | {m.itl_p50:.1f} | {m.itl_p95:.1f} | {m.itl_p99:.1f} "
                    f"| {ours.tokens_per_second / m.tokens_per_second:.2f} | {share:.2f} |"
                )
    return "\n".join(lines)


def draw_rates(results: Results, peers: Sequence[Peer], cells: Sequence[Cell], plot: Plot) -> None:
    """Draw the rates of all servers, and how many times as fast as a peer we are."""
    groups: dict[str, dict[str, Bar]] = {}
    for cell in cells:
        own = [each.figures.tokens_per_second for each in results.of(cell, OURS)]
        for peer in peers if own else ():
            if peer.runs(cell) and (turns := results.of(cell, peer.name)):
                rates = [each.figures.tokens_per_second for each in turns]
                times = statistics.median(own) / statistics.median(rates)
                note = "" if peer.name == OURS else f"  (wardrobe: {times:.1f} times)"
                groups.setdefault(label(cell), {})[peer.name] = Bar.of(rates, note)
    draw_bars(plot, "output tokens a second", groups)


def named(options: argparse.Namespace) -> list[Peer]:
    peers = [Peer(OURS, "", (False, True))]
    for texts, adapters in ((options.peer, False), (options.lora_peer, True)):
        for text in texts:
            name, _, command = text.partition("=")
            peers.append(Peer(name, command, (adapters,)))
    return peers


def run_missing(
    results: Results, peers: Sequence[Peer], rounds: Sequence[Round], base: BaseModel, until: float
) -> bool:
    """Start what the missing rounds need and measure them; tell whether the time sufficed."""
    missing = results.missing(rounds, peers)
    if not missing:
        return True
    needed = [peer for peer in peers if any(peer.runs(cell) for cell, _ in missing)]
    pool = iter(prompts(str(base.path), sum(cell.requests for cell, _ in rounds), seed=0))
    texts = {each: [next(pool) for _ in range(each[0].requests)] for each in rounds}
    with tempfile.TemporaryDirectory(prefix="wardrobe-bench-") as folder:
        home = Path(folder)
        fill_registry(home, base, Bases(default_cache() / "bases"))
        with contextlib.ExitStack() as stack:
            servers = list(up(stack, needed, home, base))
            return asyncio.run(measure(servers, missing, texts, results, until))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cells", default="8,0;32,0;8,8;32,32", help="clients,adapters;…")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--lora-peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--results", type=Path, default=Path("peers-results.jsonl"))
    add_option(parser)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    # Whoever ends it ends the servers that it started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped. The same command goes on."))
    cells, peers = parse_cells(options.cells), named(options)
    base = Bases(default_cache() / "bases").get(options.base)
    results = Results(Journal(options.results, setting(base)))
    rounds = [(cell, repeat) for repeat in range(options.repeats) for cell in cells]
    complete = run_missing(results, peers, rounds, base, until)
    print(f"\n{results.setting}, medians of {options.repeats}, {time.strftime('%F')}")
    print(f"Limits, before each turn: {results.limits()}\n")
    print(table(results, peers, cells, Sizes.read(base.path)))
    if options.plot and results.turns:
        title = f"{results.setting}, medians of {options.repeats}, {time.strftime('%F')}"
        draw_rates(results, peers, cells, Plot(options.plot, title))
    if not complete:
        raise SystemExit(f"Stopped after {options.minutes} minutes. The same command goes on.")


if __name__ == "__main__":
    main()
