"""Adapters as the operators read them: converted on the host, stacked in slots on the device.

For one fused group of linears an adapter is A [layers, parts · rank, in] and a block-diagonal
B [layers, parts · rank, out] with the scale in it. The rank is that of its bucket; rows above the
adapter's own rank, and modules it does not target, are zero, and loading overwrites the whole slot,
so nothing of an earlier adapter can be left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from serving.engine.ops.lora import Weights
from serving.engine.slots import Slot
from serving.engine.spec import LinearGroup

BUCKETS = (8, 16, 32, 64, 128, 256)  # ranks of the stacks; an adapter goes to the next one up
FIRST_ROWS = 4  # a stack begins with this many slots and doubles

Pair = tuple[torch.Tensor, torch.Tensor]  # A, B


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """A converted adapter in host memory, ready to be copied into a slot."""

    digest: str
    bucket: int
    groups: Mapping[str, Pair]  # group name → A [layers, parts · rank, in], B [layers, …, out]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.groups.values() for tensor in pair)


@dataclass(frozen=True, slots=True)
class LoraLayout:
    """Where each module's A and B go."""

    layers: int
    groups: tuple[LinearGroup, ...]

    def zeros(self, bucket: int, lead: Sequence[int], **like: object) -> dict[str, Pair]:
        """Return zero A and B for each group, with the dimensions `lead` in front."""
        return {
            group.name: (
                torch.zeros(*lead, len(group.modules) * bucket, group.inputs, **like),  # type: ignore[arg-type]  # dtype and device
                torch.zeros(*lead, len(group.modules) * bucket, sum(group.outputs), **like),  # type: ignore[arg-type]  # dtype and device
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


def write_module(
    pair: Pair, group: LinearGroup, part: int, layer: int, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Put one module's A [rank, in] and already scaled B [out, rank] into its blocks."""
    stack_a, stack_b = pair
    bucket = stack_a.shape[1] // len(group.modules)
    start = list(accumulate(group.outputs, initial=0))[part]
    first, rank = part * bucket, a.shape[0]
    stack_a[layer, first : first + rank] = a
    stack_b[layer, first : first + rank, start : start + group.outputs[part]] = b.t()


class LoraStacks:
    """The slots: for each rank bucket in use, A and B of every layer with a row for each slot."""

    def __init__(
        self, layout: LoraLayout, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.capacity, self.dtype, self.device = layout, capacity, dtype, device
        self._stacks: dict[int, dict[str, Pair]] = {}  # bucket → group → [layers, rows, …]
        self._by_layer: dict[str, list[dict[int, Pair]]] = self._views()

    def weights(self, group: str, layer: int) -> Weights:
        """Return bucket → (A [rows, parts · rank, in], B [rows, parts · rank, out])."""
        return self._by_layer[group][layer]

    def load(self, slot: Slot, adapter: HostAdapter) -> None:
        """Overwrite a slot whole. Only between steps."""
        if slot.row >= self._rows(slot.bucket):
            self._grow(slot)
        for name, pair in adapter.groups.items():
            for stack, source in zip(self._stacks[slot.bucket][name], pair, strict=True):
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
        grown = self.layout.zeros(slot.bucket, lead, dtype=self.dtype, device=self.device)
        if old_rows:
            for name, pair in self._stacks[slot.bucket].items():
                for new, old in zip(grown[name], pair, strict=True):
                    new[:, :old_rows].copy_(old)
        self._stacks[slot.bucket] = grown
        self._by_layer = self._views()

    def _views(self) -> dict[str, list[dict[int, Pair]]]:
        return {
            group.name: [
                {
                    bucket: (stack[group.name][0][layer], stack[group.name][1][layer])
                    for bucket, stack in self._stacks.items()
                }
                for layer in range(self.layout.layers)
            ]
            for group in self.layout.groups
        }
