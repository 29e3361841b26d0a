"""Steps of single tokens, captured once by size and replayed.

On a GPU a step is hundreds of launches, each of which costs the host longer than the device
computes. A captured one is a single launch. What it reads is at fixed places: the step's numbers
in a buffer of its own, weights, cache and the address book of the adapters, so neither other rows
nor a swap of adapters captures again. A batch is filled up with dead rows to the next size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from serving.engine.batch import Batch
from serving.engine.device_step import DeviceStep, pinned, step_numbers
from serving.engine.ops.triton.lora import DECODE_HEIGHT, TILE

Decode = Callable[[DeviceStep], torch.Tensor]  # single tokens → logits [rows, vocab]
Replay = Callable[[], torch.Tensor]
Pool = Any  # torch has a name for a pool of memory, but not for others


def graph_sizes(most: int) -> list[int]:
    """Return the sizes of captured batches: steps of 8 waste at most 7 rows."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most, 16)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """For each size of batch a step with adapters and one without."""

    def __init__(self, decode: Decode, sizes: Sequence[int], device: torch.device) -> None:
        """Capture them all, the largest first, so that the others fit into its memory."""
        self.device = device
        self._sizes = sorted(sizes)
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._steps = {size: _Step(decode, size, device, pool) for size in reversed(self._sizes)}

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Return logits [sampled, vocab], or None when the batch is no such step.

        The logits are those of the next step as soon as that runs.
        """
        rows = len(batch.ids)
        size = next((size for size in self._sizes if size >= rows), None)
        if size is None or batch.chunks:
            return None
        logits = self._steps[size].run(batch)
        sampled = len(batch.sampled)
        return logits[:rows] if sampled == rows else logits[batch.sampled.to(self.device)]


class _Step:
    """One size: the buffer that its two graphs read, and the graphs."""

    def __init__(self, decode: Decode, rows: int, device: torch.device, pool: Pool | None) -> None:
        self.rows = rows
        # As many tiles as rows: each may wear its own adapter. All are dead at first.
        self.numbers = torch.zeros((3 + TILE) * rows, dtype=torch.int32, device=device)
        self.numbers[2 * rows : 3 * rows] = -1
        step = DeviceStep.view(self.numbers, rows, DECODE_HEIGHT)
        self.worn = _capture(lambda: decode(step), pool)
        bare = step.without_adapters()
        self.bare = _capture(lambda: decode(bare), pool)

    def run(self, batch: Batch) -> torch.Tensor:
        numbers = step_numbers(batch, self.rows, DECODE_HEIGHT)
        numbers += [0] * (len(self.numbers) - len(numbers))  # dead tiles
        self.numbers.copy_(pinned(numbers, self.numbers.device), non_blocking=True)
        return self.worn() if batch.wears else self.bare()


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
        logits = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay
