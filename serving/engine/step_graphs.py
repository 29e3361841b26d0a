"""Steps that are captured once, by shape, and replayed.

On a GPU a step is hundreds of launches, each of which costs the host longer than the device
computes, unless prompts are long. A captured one is a single launch. What it reads is at fixed
places: the step's numbers in a buffer of its own, weights, cache and the address book of the
adapters, so neither other rows nor a swap of adapters captures again. A batch is filled up with
dead rows to the next shape.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from serving.engine.batch import Batch
from serving.engine.device_step import DeviceStep, StepShape, pinned, tile_height
from serving.engine.ops.triton.attention import QUERIES
from serving.engine.ops.triton.vectors import RowPlaces, table_of

Compute = Callable[[DeviceStep], torch.Tensor]  # → hidden [sampled, size]
Replay = Callable[[], torch.Tensor]
Pool = Any  # torch has a name for a pool of memory, but not for others

LONGEST = 1024  # tokens; a device computes more of them for longer than its host launches
CHUNKS = 16  # prompts that are read in one step, beside sequences that decode


def decode_shapes(most: int) -> list[StepShape]:
    """Return shapes of single tokens: steps of 8 waste at most 7 rows.

    There are as many tiles of LoRA as rows: each may wear its own adapter.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    sizes = [*(size for size in sizes if size < most), most]
    return [StepShape(size, 0, size, size, size) for size in sizes]


def prompt_shapes(running: int, most: int) -> list[StepShape]:
    """Return shapes of up to `most` rows, of up to `running` sequences.

    Neighbours of one adapter, and of one prompt, fill all tiles but their last; so do dead rows.
    """
    sizes = [16, 32, *range(64, 512, 64), *range(512, LONGEST, 128)]
    sizes = [*(size for size in sizes if size < most), min(most, LONGEST)]
    shapes: list[StepShape] = []
    for rows in sizes:
        sequences = min(rows, running)
        chunks = rows // QUERIES + min(sequences, CHUNKS) + 1
        worn = rows // tile_height(rows, chunks) + sequences + 1
        shapes.append(StepShape(worn, chunks, sequences, sequences, rows))
    return shapes


class StepGraphs:
    """For each shape a step without adapters, one with LoRA, and one with vectors, too."""

    def __init__(self, compute: Compute, shapes: Iterable[StepShape], device: torch.device) -> None:
        """Capture them all, the largest first, so that the others fit into its memory."""
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        large_first = sorted(shapes, key=lambda shape: shape.rows, reverse=True)
        self._steps = [_Step(compute, shape, device, pool) for shape in large_first][::-1]

    def run(self, batch: Batch, vectors: RowPlaces) -> torch.Tensor | None:
        """Return hidden [sampled, size], or None when no captured step has room for the batch.

        It is that of the next step as soon as that runs.
        """
        rows, reads = len(batch.ids), bool(batch.chunks)
        for step in self._steps:
            if step.shape.rows >= rows and bool(step.shape.chunks) is reads:
                return step.run(batch, vectors)
        return None


class _Step:
    """One shape: the buffers that its three graphs read, and the graphs."""

    def __init__(
        self, compute: Compute, shape: StepShape, device: torch.device, pool: Pool | None
    ) -> None:
        self.shape = shape
        self.numbers = torch.tensor(shape.numbers(None), dtype=torch.int32, device=device)
        self.vectors = torch.from_numpy(table_of((), shape.rows)).to(device)
        worn = shape.view(self.numbers)
        dressed, bare = worn.with_vectors(self.vectors), worn.without_adapters()
        self.dressed = _capture(lambda: compute(dressed), pool)
        self.worn = _capture(lambda: compute(worn), pool)
        self.bare = _capture(lambda: compute(bare), pool)

    def run(self, batch: Batch, vectors: RowPlaces) -> torch.Tensor | None:
        numbers = self.shape.numbers(batch)
        if numbers is None:
            return None
        device = self.numbers.device
        self.numbers.copy_(pinned(numbers, device), non_blocking=True)
        if vectors:
            table = table_of(vectors, self.shape.rows)
            self.vectors.copy_(pinned(table, device), non_blocking=True)
            hidden = self.dressed()
        else:
            hidden = self.worn() if batch.wears else self.bare()
        return hidden[: len(batch.sampled)]


def _capture(run: Replay, pool: Pool | None) -> Replay:
    """Return what does again what `run` does, into the same memory. Without a pool: `run`."""
    if pool is None:
        return run
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # compiles kernels and makes cuBLAS ready, which cannot be captured
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        hidden = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return hidden

    return replay
