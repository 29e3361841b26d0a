"""Which adapter sits in which slot: pure bookkeeping by digest, no tensors.

A digest is pinned from a request's admission to its last token. Only a digest without pins can be
evicted, so a slot never changes under a running request.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A place in the stacked LoRA tensors."""

    bucket: int  # rank of the stack
    row: int  # in that stack


class SlotTable:
    """At most `capacity` resident digests over all buckets, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._pins: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot_of(self, digest: str) -> Slot:
        return self._slots[digest]

    def pins(self, digest: str) -> int:
        return self._pins.get(digest, 0)

    def resident(self) -> list[str]:
        """Return the digests, least recently used first."""
        return list(self._slots)

    def idle(self) -> list[str]:
        """Return the digests without pins, least recently used first."""
        return [digest for digest in self._slots if digest not in self._pins]

    def place(self, digest: str, bucket: int) -> Slot:
        """Give a new digest the lowest free row of its bucket, so that used rows stay together."""
        assert digest not in self._slots, digest
        assert len(self._slots) < self.capacity, "evict before placing"
        used = {slot.row for slot in self._slots.values() if slot.bucket == bucket}
        row = next(row for row in range(self.capacity) if row not in used)
        self._slots[digest] = Slot(bucket, row)
        return self._slots[digest]

    def evict(self, digest: str) -> None:
        assert digest not in self._pins, f"{digest} is pinned {self.pins(digest)} times"
        del self._slots[digest]

    def pin(self, digest: str) -> None:
        self._slots.move_to_end(digest)
        self._pins[digest] = self.pins(digest) + 1

    def unpin(self, digest: str) -> None:
        self._slots.move_to_end(digest)
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]
