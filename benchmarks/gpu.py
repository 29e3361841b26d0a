"""Time of a decode step on a GPU: batches that wear many adapters, beside the floor and PEFT.

    python -m benchmarks.gpu [--shape 1b 8b] [--table FILE.md]
    python -m benchmarks.gpu --shape tiny --device cpu      # the same code, small, interpreted

Weights and adapters (all seven linears) are random; every row has `--context` tokens behind it. A
step is what the engine does for one: plan, compute, choose the tokens, bring them to the host. The
floor is the bytes that a step must read (weights, the adapters that are worn, keys and values) over
the read bandwidth that is measured here before. PEFT computes the same batch with `adapter_names`,
or with one active adapter where there is only one, at `--peft-rank` alone and up to
`--peft-adapters`: adding one takes it the longer the more it has, seconds with 128.

Each figure is written to `--results` when it is measured; the same command goes on where it was
stopped. `--minutes` ends it in time, and the table has what is there by then.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.progress import Progress

from benchmarks.journal import Journal

if TYPE_CHECKING:
    from benchmarks.gpu_bodies import Steps

Body = Literal["wardrobe", "peft"]
SHAPES = ("1b", "8b", "tiny")
BATCHES, ADAPTERS, RANKS = (1, 8, 32, 64, 128), (1, 8, 32, 128), (8, 16, 64)
SMALL = ((1, 2), (1, 2), (4,))  # the same for the shape tiny
WARM_UP, FEWEST = 2, 3  # steps
LONGEST = 3000  # milliseconds: PEFT's steps of many adapters take seconds


@dataclass(frozen=True, slots=True)
class Cell:
    """One place in the table: `adapters` of `rank` are worn by `batch` rows, in turn."""

    shape: str
    batch: int
    adapters: int
    rank: int  # 0 without adapters
    body: Body


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured in a cell; None: it does not fit this device's memory."""

    cell: Cell
    milliseconds: float | None
    floor: float  # milliseconds


def most_rows(shape: str) -> int:
    return max(SMALL[0] if shape == "tiny" else BATCHES)


def cells(shape: str, body: Body, peft_rank: int, peft_adapters: int) -> list[Cell]:
    """Return the cells of one shape; ranks outside, so that adapters are loaded once for each."""
    batches, adapters, ranks = SMALL if shape == "tiny" else (BATCHES, ADAPTERS, RANKS)
    if body == "peft":
        ranks = ranks if shape == "tiny" else (peft_rank,)
        adapters = [count for count in adapters if count <= peft_adapters]
    return [
        *(Cell(shape, batch, 0, 0, body) for batch in batches),
        *(
            Cell(shape, batch, count, rank, body)
            for rank in ranks
            for count in adapters
            for batch in batches
            if count <= batch
        ),
    ]


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
    """Yield the lines of a Markdown table for each shape."""
    yield f"{datetime.now(UTC):%Y-%m-%d}, {results.setting}."
    for shape in shapes:
        yield f"\n**{shape}**\n"
        yield "| batch | adapters | rank | ms | share of the floor | cost of LoRA | PEFT, ms |"
        yield "|---:|---:|---:|---:|---:|---:|---:|"
        own = [cell for cell in results.figures if cell.shape == shape and cell.body == "wardrobe"]
        for cell in sorted(own, key=lambda c: (c.batch, c.adapters, c.rank)):
            yield _line(results, cell)


def _line(results: Results, cell: Cell) -> str:
    figure = results.figures[cell]
    bare = results.figures.get(Cell(cell.shape, cell.batch, 0, 0, cell.body))
    peft = results.figures.get(Cell(cell.shape, cell.batch, cell.adapters, cell.rank, "peft"))
    took, cost = figure.milliseconds, ""
    if took and bare and bare.milliseconds and cell.adapters:
        cost = f"{100 * (took / bare.milliseconds - 1):+.0f} %"
    share = f"{figure.floor / took:.2f}" if took else ""
    return (
        f"| {cell.batch} | {cell.adapters} | {cell.rank or ''} | {_text(figure)} "
        f"| {share} | {cost} | {_text(peft) if peft else ''} |"
    )


def _text(figure: Figure) -> str:
    return "no memory" if figure.milliseconds is None else f"{figure.milliseconds:.2f}"


def measure(results: Results, options: argparse.Namespace, device: torch.device) -> bool:
    """Fill in the cells that are missing; tell whether the time sufficed."""
    from benchmarks.gpu_bodies import BODIES, read_bandwidth  # imports Triton: see main

    until = time.monotonic() + 60 * options.minutes
    bandwidth = read_bandwidth(device)
    bodies: list[tuple[str, Body]] = [(s, b) for b in ("wardrobe", "peft") for s in options.shape]
    with Progress() as progress:
        for shape, body in bodies:
            wanted = cells(shape, body, options.peft_rank, options.peft_adapters)
            missing = [cell for cell in wanted if cell not in results.figures]
            bar = progress.add_task(f"{shape} {body}", total=len(wanted))
            progress.advance(bar, len(wanted) - len(missing))
            if not missing:
                continue
            try:
                model = BODIES[body](shape, options.context, device)
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
        step, size = model.step(cell.batch, cell.adapters, cell.rank)
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
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peft-rank", type=int, choices=RANKS, default=16)
    parser.add_argument("--peft-adapters", type=int, choices=ADAPTERS, default=32)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--results", type=Path, default=Path("gpu-results.jsonl"))
    parser.add_argument("--table", type=Path, default=None, help="write the table here, too")
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
    if not complete:
        raise SystemExit(
            f"Stopped after {options.minutes} minutes. The same command goes on from here."
        )


def _setting(device: torch.device, context: int) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return f"{name}, torch {torch.__version__}, {context} tokens of context"


if __name__ == "__main__":
    main()
