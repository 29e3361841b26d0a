"""Which adapter sits in which slot: pure bookkeeping by digest, no tensors.

Slots of all ranks share one row of pages, each as large as an adapter of the lowest rank. A slot of
a higher rank is a run of pages that begins at a multiple of its own length, as in a buddy system
(Knowlton, A fast storage allocator, CACM 1965): a rank of 256 costs what it weighs and nobody else.
What an adapter has beside LoRA lies on further pages of its slot, behind these.

A digest is pinned from a request's admission to its last token. Only a digest without pins can be
evicted, so a slot never changes under a running request.
"""

from collections import OrderedDict
from dataclasses import dataclass

BUCKETS = (8, 16, 32, 64, 128, 256)  # ranks of slots; an adapter goes to the next one up


def bucket_of(rank: int) -> int:
    return next(bucket for bucket in BUCKETS if bucket >= rank)


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """A place for one adapter: one row of what a bucket sees as its stack."""

    bucket: int  # rank
    row: int
    more: int = 0  # pages behind the row

    @property
    def pages(self) -> range:
        length = self.bucket // BUCKETS[0]
        return range(self.row * length, (self.row + 1) * length + self.more)

    def rows_of(self, bucket: int, more: int = 0) -> range:
        """Return the rows of a bucket whose slots, with `more` pages, share pages with this one."""
        length = bucket // BUCKETS[0]
        first = max(0, (self.pages.start - more) // length)
        return range(first, -(-self.pages.stop // length))

    def overlaps(self, other: "Slot") -> bool:
        """Tell whether they share pages."""
        return self.pages.start < other.pages.stop and other.pages.start < self.pages.stop


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter could go, and who has to leave its slot for that."""

    slot: Slot
    leaving: tuple[str, ...]  # digests, least recently used first


class SlotTable:
    """Resident digests in `pages` pages, the least recently used first; `most` of them at most.

    `highest` is the highest bucket that an adapter may have: one slot of it must fit.
    """

    def __init__(self, pages: int, highest: int, most: int | None = None) -> None:
        self.pages, self.highest = pages, highest
        self.most = pages if most is None else min(pages, most)
        self.used_pages = 0
        self.changes = 0  # of who is here, and of who is pinned
        self._slots: OrderedDict[str, Slot] = OrderedDict()
        self._pins: dict[str, int] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def rows(self, bucket: int, more: int = 0) -> int:
        """Return at how many rows a slot of a bucket, with `more` pages, could begin."""
        return max(0, (self.pages - more) * BUCKETS[0] // bucket)

    def slot_of(self, digest: str) -> Slot:
        return self._slots[digest]

    def pins(self, digest: str) -> int:
        return self._pins.get(digest, 0)

    def resident(self) -> list[str]:
        """Return the digests, least recently used first."""
        return list(self._slots)

    def choices(self, bucket: int, more: int = 0) -> list[Place]:
        """Return where an adapter could go: the place whose last use is longest ago comes first.

        If there is a place that nobody has to leave it is the only one, and the lowest, so that
        used pages stay together.
        """
        taken: dict[int, tuple[str, ...]] = {}  # row → digests, both in order of use
        for digest, slot in self._slots.items():
            for row in slot.rows_of(bucket, more):
                taken[row] = (*taken.pop(row, ()), digest)
        rows = self.rows(bucket, more)
        free = next((row for row in range(rows) if row not in taken), None)
        if free is None:
            return [Place(Slot(bucket, row, more), who) for row, who in taken.items() if row < rows]
        if len(self) < self.most:
            return [Place(Slot(bucket, free, more), ())]
        return [Place(Slot(bucket, free, more), (digest,)) for digest in self._slots]

    def place(self, digest: str, slot: Slot) -> None:
        assert digest not in self._slots, digest
        assert len(self) < self.most, "evict before placing"
        assert slot.pages.stop <= self.pages, slot
        assert not any(slot.overlaps(other) for other in self._slots.values()), slot
        self._slots[digest] = slot
        self.used_pages += len(slot.pages)
        self.changes += 1

    def evict(self, digest: str) -> None:
        assert digest not in self._pins, f"{digest} is pinned {self.pins(digest)} times"
        self.used_pages -= len(self._slots.pop(digest).pages)
        self.changes += 1

    def pin(self, digest: str) -> None:
        self.changes += 1
        self._slots.move_to_end(digest)
        self._pins[digest] = self.pins(digest) + 1

    def unpin(self, digest: str) -> None:
        self.changes += 1
        self._slots.move_to_end(digest)
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]
