"""Adapters as the operators read them: converted on the host, in slots on the device.

For one fused group of linears an adapter is one A [layers, parts · rank, in], because the parts
read the same input, and a B [layers, rank, out] for each part, with the scale in it. The compiled
operators read B in panels, as the weight of a linear. The rank is that of its bucket; rows above
the adapter's own rank, and modules it does not target, are zero, and loading overwrites the whole
slot, so nothing of an earlier adapter can be left.

An adapter is one piece of memory, as large as its bucket's rank is and with its vectors behind, and
all slots lie in one arena of a fixed size. Every bucket sees the whole arena as a stack of its own
slots; which of them are somebody's is for the `SlotTable` to know. So nothing is ever moved or
given by the system while steps run, no rank has memory set aside for it, and addresses stay (as
CUDA graphs want them).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

from serving.engine.linear import PANEL, pack
from serving.engine.ops.lora import Weights
from serving.engine.pages import LaterPages, PagesAhead, lazy_zeros
from serving.engine.slots import BUCKETS, Slot
from serving.engine.spec import LinearGroup
from serving.engine.vectors import Vectors

AHEAD = 8  # adapters of the lowest rank that memory is ready for before they come

Halves = tuple[torch.Tensor, ...]  # A of the group, then B of each of its parts


class Unfit(Exception):
    """Why an adapter does not fit this model."""


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """A converted adapter in host memory, ready to be copied into a slot."""

    digest: str
    bucket: int
    weights: torch.Tensor  # [LoraLayout.size(bucket)], and behind them the bytes of `vectors`
    vectors: Vectors | None = None

    @property
    def size_bytes(self) -> int:
        return self.weights.nbytes

    def vectors_in(self, copy: torch.Tensor) -> Vectors | None:
        """Return the vectors as they lie in a copy of `weights`."""
        if self.vectors is None:
            return None
        return self.vectors.laid_out(copy[-(self.vectors.size_bytes // copy.itemsize) :])

    def pinned(self) -> "HostAdapter":
        """Return it in memory that a GPU reads by itself, while steps run."""
        weights = self.weights.pin_memory()
        return replace(self, weights=weights, vectors=self.vectors_in(weights))


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Where each module's A and B go."""

    layers: int
    groups: tuple[LinearGroup, ...]
    prefix: str = "model.layers."  # of a layer's modules, before its number
    packed: bool = False  # every B lies as `pack_b` makes it: the compiled operators write it

    def size(self, bucket: int) -> int:
        """Return the numbers of one adapter. They grow as the rank does."""
        return self.layers * sum(
            prod(shape) for group in self.groups for shape in self._shapes(group, bucket)
        )

    @property
    def linears(self) -> int:
        return self.layers * sum(len(group.modules) for group in self.groups)

    def share(self, bucket: int) -> float:
        """Return the size of one adapter over that of the linears."""
        linears = sum(group.inputs * sum(group.outputs) for group in self.groups)
        return self.size(bucket) / (self.layers * linears)

    def stacks(self, memory: torch.Tensor, bucket: int) -> dict[str, Halves]:
        """See contiguous memory as adapters of a bucket, one behind the other.

        Returns for each group A [layers, slots, parts · rank, in] and B's [layers, slots, rank,
        out] or, packed, [layers, slots, panels, rank · 32]. What does not make a whole adapter at
        the end is left out.
        """
        size, offset = self.size(bucket), memory.storage_offset()
        found: dict[str, Halves] = {}
        for group in self.groups:
            halves: list[torch.Tensor] = []
            for rows, columns in self._shapes(group, bucket):
                shape = (self.layers, len(memory) // size, rows, columns)
                strides = (rows * columns, size, columns, 1)
                halves.append(memory.as_strided(shape, strides, offset))
                offset += self.layers * rows * columns
            found[group.name] = tuple(halves)
        return found

    def find(self, module: str) -> tuple[LinearGroup, int] | None:
        """Return the group of a module inside a layer and its place there."""
        for group in self.groups:
            if module in group.modules:
                return group, group.modules.index(module)
        return None

    def place(self, module: str) -> tuple[LinearGroup, int, int]:
        """Return group, place in it and layer of a whole name. Raises Unfit."""
        head, _, rest = module.removeprefix(self.prefix).partition(".")
        found = self.find(rest) if head.isdecimal() and int(head) < self.layers else None
        if found is None or module != f"{self.prefix}{head}.{rest}":
            raise Unfit(f"{module} is not a linear layer that this base model can adapt.")
        return *found, int(head)

    def write(
        self,
        halves: Halves,
        place: tuple[LinearGroup, int],
        layers: Sequence[int],
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> None:
        """Put A [n, rank, in] and B [n, out, rank], times the scale, of n layers into their places.

        `halves` are those of one slot, not packed, `layers` are ascending. A scaled number is
        rounded once, to the numbers of the slots.
        """
        (group, part), stack_a, rank = place, halves[0], a.shape[1]
        bucket = stack_a.shape[1] // len(group.modules)
        # All between two layers are written as a slice: a list of them takes half as long again.
        whole = len(layers) == layers[-1] - layers[0] + 1
        where = slice(layers[0], layers[-1] + 1) if whole else layers
        b = ((b if b.dtype == stack_a.dtype else b.float()) * scale).to(stack_a.dtype)
        stack_a[where, part * bucket : part * bucket + rank] = a.to(stack_a.dtype)
        halves[1 + part][where, :rank] = b.mT

    def _shapes(self, group: LinearGroup, bucket: int) -> Sequence[tuple[int, int]]:
        parts = range(len(group.modules))
        if self.packed:
            panels = (-(-(panel_offset(group, p) + group.outputs[p]) // PANEL) for p in parts)
            bs = [(count, bucket * PANEL) for count in panels]
        else:
            bs = [(bucket, out) for out in group.outputs]
        return ((len(parts) * bucket, group.inputs), *bs)


def pack_b(b: torch.Tensor, offset: int) -> torch.Tensor:
    """Lay B's [..., out, rank] out in the panels of their group, as [..., panels, rank · 32].

    `offset` outputs of the first panel belong to the part before; they are zero here.
    """
    return pack(F.pad(b, (0, 0, offset, 0)) if offset else b)


def panel_offset(group: LinearGroup, part: int) -> int:
    """Return how many outputs of the first panel of a part belong to the part before it."""
    return sum(group.outputs[:part]) % PANEL


class LoraStacks:
    """The slots: A and B of every layer, for each rank bucket that has room for one at least."""

    def __init__(
        self, layout: LoraLayout, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Make room for `pages` adapters of the lowest rank, or fewer of higher ones."""
        self.layout, self.page_bytes = layout, layout.size(BUCKETS[0]) * dtype.itemsize
        self.arena = lazy_zeros((pages * layout.size(BUCKETS[0]),), dtype, device)
        self.large_pages = LaterPages(self.arena)
        self._pages_ahead = PagesAhead(self.arena, AHEAD * self.page_bytes)
        self._stacks = {
            bucket: layout.stacks(self.arena, bucket)
            for bucket in BUCKETS
            if layout.size(bucket) <= len(self.arena)
        }
        self._by_layer = self._views()
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.vectors: dict[Slot, Vectors] = {}

    @property
    def buckets(self) -> Collection[int]:
        return self._stacks.keys()

    def weights(self, group: str, layer: int) -> Weights:
        """Return bucket → A [slots, parts · rank, in], then each part's B, as `stacks` has it."""
        return self._by_layer[group][layer]

    def whole(self, group: str) -> dict[int, Halves]:
        """Return bucket → A and B's as `weights` has them, with all layers in front."""
        return {bucket: stack[group] for bucket, stack in self._stacks.items()}

    def load(self, slot: Slot, adapter: HostAdapter, start: int = 0, most: int = 1 << 62) -> int:
        """Overwrite a slot from its number `start` on, `most` bytes of it. Only between steps.

        Returns up to where it is written; whole is `len(adapter.weights)`. A GPU copies while it
        computes the steps between, and the step after the last piece waits for that one.
        """
        size = len(adapter.weights)
        room = self.arena[slot.row * self.layout.size(slot.bucket) :][:size]
        if start == 0:
            self._see_vectors(slot, adapter.vectors_in(room))
        stop = min(size, start + most // adapter.weights.itemsize)
        place, piece = room[start:stop], adapter.weights[start:stop]
        if self._aside is None:
            place.copy_(piece)
            self.large_pages.wrote(place)
            self._pages_ahead.wrote(place)
            return stop
        steps = torch.cuda.current_stream(place.device)
        if start == 0:  # a step that reads what is there now may not have ended on the device
            self._aside.wait_stream(steps)
        with torch.cuda.stream(self._aside):
            place.copy_(piece, non_blocking=True)
        if stop == size:
            steps.wait_stream(self._aside)
        return stop

    def more_pages(self, adapter: HostAdapter) -> int:
        """Return how many pages its vectors take, behind those of its rank."""
        page = self.layout.size(BUCKETS[0])
        return -(-(len(adapter.weights) - self.layout.size(adapter.bucket)) // page)

    def _see_vectors(self, slot: Slot, vectors: Vectors | None) -> None:
        """Nothing is left of what lay on these pages."""
        for gone in [each for each in self.vectors if each.overlaps(slot)]:
            del self.vectors[gone]
        if vectors is not None:
            self.vectors[slot] = vectors

    def _views(self) -> dict[str, list[dict[int, Halves]]]:
        return {
            group.name: [
                {
                    bucket: tuple(half[layer] for half in stack[group.name])
                    for bucket, stack in self._stacks.items()
                }
                for layer in range(self.layout.layers)
            ]
            for group in self.layout.groups
        }
