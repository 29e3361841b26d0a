"""Time of a step on a GPU: batches and prompts that wear adapters, beside the floor and PEFT.

    python -m benchmarks.gpu [--shape 1b 8b] [--parts decode vectors prompts peft] [--table FILE.md]
    python -m benchmarks.gpu --shape tiny --device cpu      # the same code, small, interpreted

Weights and adapters (all seven linears) are random. A step is what the engine does for one: plan,
compute, choose the tokens, bring them to the host. Decoding, every row has `--context` tokens
behind it; a prompt is one sequence's, read in as many steps as the engine takes, without what it
captured and with it. `vectors` is decoding with a scale and a shift after every linear, as DoRA
has, and norms, beside the LoRA. The floor of decoding is the bytes that a step must read (weights,
the adapters that are worn, keys and values) over the read bandwidth that is measured here before.
PEFT computes the same with `adapter_names`, or with one active adapter where there is only one.
Both are of `--peft-rank` alone, and PEFT has up to `--peft-adapters`: its steps take seconds with
128.

Each figure is written to `--results` when it is measured; the same command goes on where it was
stopped. `--minutes` ends it in time, and the table has what is there by then.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.progress import Progress

from benchmarks.journal import Journal
from benchmarks.plots import Bar, Plot, add_option, draw_bars

if TYPE_CHECKING:
    from benchmarks.gpu_bodies import Steps

# launched: wardrobe, kernel by kernel; dressed: wardrobe, adapters with vectors
Body = Literal["wardrobe", "launched", "dressed", "peft"]
Part = Literal["decode", "vectors", "prompts", "peft"]
SHAPES = ("1b", "8b", "tiny")
PARTS: tuple[Part, ...] = ("decode", "vectors", "prompts", "peft")
BATCHES, ADAPTERS, RANKS, PROMPTS = (
    (1, 8, 32, 64, 128),
    (1, 8, 32, 128),
    (8, 16, 64),
    (128, 500, 2000),
)
SMALL = ((1, 2), (1, 2), (4,), (3, 12))  # the same for the shape tiny
WARM_UP, FEWEST = 2, 3  # steps
LONGEST = 3000  # milliseconds: PEFT's steps of many adapters take seconds


@dataclass(frozen=True, slots=True)
class Cell:
    """One place in a table: `adapters` of `rank` are worn by `batch` rows, in turn.

    They decode, or read `prompt` tokens each.
    """

    shape: str
    batch: int
    adapters: int
    rank: int  # 0 without adapters
    body: Body
    prompt: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured in a cell; None: it does not fit this device's memory."""

    cell: Cell
    milliseconds: float | None
    floor: float  # milliseconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured of a shape."""

    batches: Sequence[int]
    adapters: Sequence[int]
    ranks: Sequence[int]
    prompts: Sequence[int]

    @classmethod
    def of(cls, shape: str) -> "Sizes":
        return cls(*(SMALL if shape == "tiny" else (BATCHES, ADAPTERS, RANKS, PROMPTS)))


def cells(shape: str, part: Part, peft_rank: int, peft_adapters: int) -> list[Cell]:
    """Return what one part measures of a shape, in an order in which adapters are only added."""
    sizes = Sizes.of(shape)
    rank = sizes.ranks[0] if shape == "tiny" else peft_rank
    if part == "prompts":
        return _reading(shape, "launched", rank) + _reading(shape, "wardrobe", rank)
    body, ranks, adapters = "wardrobe", sizes.ranks, sizes.adapters
    bare = [Cell(shape, batch, 0, 0, body) for batch in sizes.batches]
    if part == "vectors":
        body, ranks, bare = "dressed", (rank,), []
    if part == "peft":
        body, ranks = "peft", (rank,)
        adapters = [count for count in adapters if count <= peft_adapters]
        bare = [replace(cell, body=body) for cell in bare]
    found = bare + [
        Cell(shape, batch, count, rank, body)
        for rank in ranks
        for count in adapters
        for batch in sizes.batches
        if count <= batch
    ]
    if part == "peft":
        found += _reading(shape, body, rank)
    return sorted(found, key=lambda cell: (cell.rank, cell.adapters))


def _reading(shape: str, body: Body, rank: int) -> list[Cell]:
    prompts = Sizes.of(shape).prompts
    worn = [(0, 0), (1, rank)]
    return [Cell(shape, 1, count, r, body, prompt) for count, r in worn for prompt in prompts]


class Results:
    """What was measured on this device, in this run and in earlier ones."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self.setting = journal, journal.setting
        figures = (Figure(Cell(**entry.pop("cell")), **entry) for entry in journal)
        self.figures = {figure.cell: figure for figure in figures}

    def add(self, figure: Figure) -> None:
        self.figures[figure.cell] = figure
        self._journal.write(asdict(figure))


def table(results: Results, shapes: Sequence[str]) -> Iterator[str]:
    """Yield the lines of two Markdown tables for each shape: decoding, and reading a prompt."""
    yield f"{datetime.now(UTC):%Y-%m-%d}, {results.setting}."
    for shape in shapes:
        own = [cell for cell in results.figures if cell.shape == shape and cell.body == "wardrobe"]
        yield f"\n**{shape}**\n"
        yield (
            "| batch | adapters | rank | ms | share of the floor | cost of LoRA | with vectors, ms "
            "| PEFT, ms |"
        )
        yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
        decoding = [cell for cell in own if not cell.prompt]
        for cell in sorted(decoding, key=lambda c: (c.batch, c.adapters, c.rank)):
            yield _decode_line(results, cell)
        yield "\n| prompt | adapters | rank | ms | not captured, ms | cost of LoRA | PEFT, ms |"
        yield "|---:|---:|---:|---:|---:|---:|---:|"
        reading = [cell for cell in own if cell.prompt]
        for cell in sorted(reading, key=lambda c: (c.prompt, c.adapters)):
            yield _prompt_line(results, cell)


def draw_shares(results: Results, shapes: Sequence[str], rank: int, plot: Plot) -> None:
    """Draw how near decode steps are to the memory floor, with adapters of one rank."""
    groups: dict[str, dict[str, Bar]] = {}
    for figure in results.figures.values():
        cell = figure.cell
        own = cell.shape in shapes and cell.body == "wardrobe" and not cell.prompt
        if own and cell.rank in (0, rank) and figure.milliseconds:
            note = f"  ({figure.milliseconds:.1f} ms)"
            bars = groups.setdefault(f"{cell.shape}, batch {cell.batch}", {})
            share = figure.floor / figure.milliseconds
            bars[f"{cell.adapters} adapters" if cell.adapters else "none"] = Bar(share, note=note)
    draw_bars(plot, f"share of the memory floor; adapters of rank {rank}", groups, digits=2)


def _decode_line(results: Results, cell: Cell) -> str:
    figure = results.figures[cell]
    dressed, peft = (_text(results, cell, body) for body in ("dressed", "peft"))
    share = f"{figure.floor / figure.milliseconds:.2f}" if figure.milliseconds else ""
    return (
        f"| {cell.batch} | {cell.adapters} | {cell.rank or ''} | {_text(results, cell)} "
        f"| {share} | {_cost(results, cell)} | {dressed} | {peft} |"
    )


def _prompt_line(results: Results, cell: Cell) -> str:
    launched, peft = (_text(results, cell, body) for body in ("launched", "peft"))
    return (
        f"| {cell.prompt} | {cell.adapters} | {cell.rank or ''} | {_text(results, cell)} "
        f"| {launched} | {_cost(results, cell)} | {peft} |"
    )


def _cost(results: Results, cell: Cell) -> str:
    """Return by how much adapters make a step longer."""
    took = results.figures[cell].milliseconds
    bare = results.figures.get(replace(cell, adapters=0, rank=0))
    if not (cell.adapters and took and bare and bare.milliseconds):
        return ""
    return f"{100 * (took / bare.milliseconds - 1):+.0f} %"


def _text(results: Results, cell: Cell, body: Body = "wardrobe") -> str:
    figure = results.figures.get(replace(cell, body=body))
    if figure is None:
        return ""
    return "no memory" if figure.milliseconds is None else f"{figure.milliseconds:.2f}"


def measure(results: Results, options: argparse.Namespace, device: torch.device) -> bool:
    """Fill in the cells that are missing; tell whether the time sufficed."""
    from benchmarks.gpu_bodies import body_of, read_bandwidth  # imports Triton: see main

    until = time.monotonic() + 60 * options.minutes
    bandwidth = read_bandwidth(device)
    with Progress() as progress:
        for part, shape in product(options.parts, options.shape):
            wanted = cells(shape, part, options.peft_rank, options.peft_adapters)
            missing = [cell for cell in wanted if cell not in results.figures]
            bar = progress.add_task(f"{shape} {part}", total=len(wanted))
            progress.advance(bar, len(wanted) - len(missing))
            if not missing:
                continue
            try:
                model = body_of(shape, part, options.context, device)
            except torch.OutOfMemoryError:
                model = None
            for cell in missing:
                if time.monotonic() > until:
                    return False
                took, size = _milliseconds(model, cell, options.steps) if model else (None, 0)
                results.add(Figure(cell, took, 1e3 * size / bandwidth))
                progress.advance(bar)
            del model
            gc.collect()
            torch.cuda.empty_cache()
    return True


def _milliseconds(model: "Steps", cell: Cell, steps: int) -> tuple[float | None, int]:
    """Return the median, and the bytes of a step; what does not fit has none.

    A step ends when its tokens are on the host.
    """
    try:
        step, size = model.step(cell)
        times: list[float] = []
        while len(times) < WARM_UP + steps and (
            len(times) < WARM_UP + FEWEST or sum(times) < LONGEST
        ):
            started = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - started))
    except torch.OutOfMemoryError:
        return None, 0
    return statistics.median(times[WARM_UP:]), size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peft-rank", type=int, choices=RANKS, default=16)
    parser.add_argument("--peft-adapters", type=int, choices=ADAPTERS, default=32)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--results", type=Path, default=Path("gpu-results.jsonl"))
    parser.add_argument("--table", type=Path, default=None, help="write the table here, too")
    add_option(parser)
    options = parser.parse_args()
    if options.device == "cpu" and options.shape != ["tiny"]:
        parser.error("a CPU only interprets the kernels: --device cpu goes with --shape tiny.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no CUDA device, so there is nothing to measure. "
            "To run the same code small on this CPU: --shape tiny --device cpu"
        )
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    device = torch.device(options.device)
    results = Results(Journal(options.results, _setting(device, options.context)))
    complete = measure(results, options, device)
    text = "\n".join(table(results, options.shape))
    print(text)
    if options.table is not None:
        options.table.write_text(text + "\n")
    if options.plot:
        draw_shares(results, options.shape, options.peft_rank, Plot(options.plot, results.setting))
    if not complete:
        raise SystemExit(
            f"Stopped after {options.minutes} minutes. The same command goes on from here."
        )


def _setting(device: torch.device, context: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return f"{name}, torch {torch.__version__}, {context} tokens of context"


if __name__ == "__main__":
    main()
