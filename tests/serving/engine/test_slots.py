"""Slots: pure bookkeeping."""

import random

import pytest

from serving.engine.slots import Slot, SlotTable


def test_the_lowest_free_row_of_a_bucket_is_taken() -> None:
    table = SlotTable(4)
    assert [table.place(d, b) for d, b in (("a", 8), ("b", 16), ("c", 8))] == [
        Slot(8, 0),
        Slot(16, 0),
        Slot(8, 1),
    ]
    table.evict("a")
    assert table.place("d", 8) == Slot(8, 0)


def test_idle_digests_come_least_recently_used_first() -> None:
    table = SlotTable(3)
    for digest in "abc":
        table.place(digest, 8)
    table.pin("a")
    table.pin("b")
    table.unpin("a")
    assert table.idle() == ["c", "a"]
    assert table.resident() == ["c", "b", "a"]


def test_a_pinned_digest_cannot_be_evicted() -> None:
    table = SlotTable(1)
    table.place("a", 8)
    table.pin("a")
    table.pin("a")
    table.unpin("a")
    with pytest.raises(AssertionError, match="pinned 1 times"):
        table.evict("a")
    table.unpin("a")
    table.evict("a")
    assert len(table) == 0


def test_no_two_digests_ever_share_a_slot() -> None:
    rng, table = random.Random(0), SlotTable(6)
    buckets: dict[str, int] = {}
    for step in range(5000):
        if len(table) == 6 or (buckets and rng.random() < 0.4):
            table.evict(victim := rng.choice(table.idle()))
            del buckets[victim]
        else:
            digest = f"d{step}"
            buckets[digest] = rng.choice((8, 16, 64))
            table.place(digest, buckets[digest])
        slots = [table.slot_of(digest) for digest in buckets]
        assert len(set(slots)) == len(slots)
        assert all(table.slot_of(d).bucket == b for d, b in buckets.items())
        assert all(slot.row < 6 for slot in slots)
