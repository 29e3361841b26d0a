"""Adapters as the operators read them: converted on the host, stacked in slots on the device.

For one fused group of linears an adapter is one A [layers, parts · rank, in], because the parts
read the same input, and a B [layers, rank, out] for each part, with the scale in it. The rank is
that of its bucket; rows above the adapter's own rank, and modules it does not target, are zero, and
loading overwrites the whole slot, so nothing of an earlier adapter can be left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from serving.engine.ops.lora import Weights
from serving.engine.slots import Slot
from serving.engine.spec import LinearGroup

BUCKETS = (8, 16, 32, 64, 128, 256)  # ranks of the stacks; an adapter goes to the next one up
FIRST_ROWS = 4  # a stack begins with this many slots and doubles

Halves = tuple[torch.Tensor, ...]  # A of the group, then B of each of its parts


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """A converted adapter in host memory, ready to be copied into a slot."""

    digest: str
    bucket: int
    groups: Mapping[str, Halves]  # group name → A [layers, parts · rank, in], B [layers, rank, out]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for halves in self.groups.values() for tensor in halves)


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Where each module's A and B go."""

    layers: int
    groups: tuple[LinearGroup, ...]
    prefix: str = "model.layers."  # of a layer's modules, before its number

    def zeros(
        self, bucket: int, lead: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> dict[str, Halves]:
        """Return zero A and B's for each group, with the dimensions `lead` in front."""

        def zero(*shape: int) -> torch.Tensor:
            return torch.zeros(*lead, *shape, dtype=dtype, device=device)

        return {
            group.name: (
                zero(len(group.modules) * bucket, group.inputs),
                *(zero(bucket, out) for out in group.outputs),
            )
            for group in self.groups
        }

    def find(self, module: str) -> tuple[LinearGroup, int] | None:
        """Return the group of a module inside a layer and its place there."""
        for group in self.groups:
            if module in group.modules:
                return group, group.modules.index(module)
        return None


def bucket_of(rank: int) -> int:
    return next(bucket for bucket in BUCKETS if bucket >= rank)


def write_module(halves: Halves, part: int, layer: int, a: torch.Tensor, b: torch.Tensor) -> None:
    """Put one module's A [rank, in] and already scaled B [out, rank] into their places."""
    stack_a, stack_b = halves[0], halves[1 + part]
    first, rank = part * stack_b.shape[1], a.shape[0]
    stack_a[layer, first : first + rank] = a
    stack_b[layer, :rank] = b.t()


class LoraStacks:
    """The slots: for each rank bucket in use, A and B of every layer with a row for each slot."""

    def __init__(
        self, layout: LoraLayout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.capacity, self.dtype, self.device = layout, capacity, dtype, device
        self._stacks: dict[int, dict[str, Halves]] = {}  # bucket → group → [layers, rows, …]
        self._by_layer = self._views()

    def weights(self, group: str, layer: int) -> Weights:
        """Return bucket → A [rows, parts · rank, in], then each part's B [rows, rank, out]."""
        return self._by_layer[group][layer]

    def whole(self, group: str) -> dict[int, Halves]:
        """Return bucket → A and B's as `weights` has them, with all layers in front."""
        return {bucket: stack[group] for bucket, stack in self._stacks.items()}

    def load(self, slot: Slot, adapter: HostAdapter) -> None:
        """Overwrite a slot whole. Only between steps."""
        if slot.row >= self._rows(slot.bucket):
            self._grow(slot)
        for name, halves in adapter.groups.items():
            for stack, source in zip(self._stacks[slot.bucket][name], halves, strict=True):
                stack[:, slot.row].copy_(source, non_blocking=True)

    def _rows(self, bucket: int) -> int:
        if bucket not in self._stacks:
            return 0
        return next(iter(self._stacks[bucket].values()))[0].shape[1]

    def _grow(self, slot: Slot) -> None:
        """Make room for the slot's row; doubling keeps the copies few."""
        old_rows = self._rows(slot.bucket)
        rows = min(self.capacity, max(FIRST_ROWS, 2 * old_rows, slot.row + 1))
        lead = (self.layout.layers, rows)
        grown = self.layout.zeros(slot.bucket, lead, self.dtype, self.device)
        if old_rows:
            for name, halves in self._stacks[slot.bucket].items():
                for new, old in zip(grown[name], halves, strict=True):
                    new[:, :old_rows].copy_(old)
        self._stacks[slot.bucket] = grown
        self._by_layer = self._views()

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
