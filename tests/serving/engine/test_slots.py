"""Slots: pure bookkeeping."""

import random

import pytest

from serving.engine.slots import BUCKETS, Place, Slot, SlotTable


def put(table: SlotTable, digest: str, bucket: int) -> Slot:
    """Place where nobody has to leave."""
    [place] = table.choices(bucket)
    assert place.leaving == ()
    table.place(digest, place.slot)
    return place.slot


def test_the_lowest_free_pages_are_taken() -> None:
    table = SlotTable(8, 64)
    assert [put(table, d, b) for d, b in (("a", 8), ("b", 16), ("c", 8), ("d", 32))] == [
        Slot(8, 0),
        Slot(16, 1),
        Slot(8, 1),
        Slot(32, 1),
    ]
    assert table.used_pages == 8
    table.evict("a")
    assert table.used_pages == 7
    assert put(table, "e", 8) == Slot(8, 0)


def test_a_high_rank_costs_its_own_pages_only() -> None:
    table = SlotTable(64, 256)
    put(table, "wide", 256)
    for digest in range(32):
        put(table, str(digest), 8)
    assert len(table) == 33
    assert table.used_pages == 64


def test_the_choice_is_by_the_latest_use_of_what_would_have_to_leave() -> None:
    table = SlotTable(4, 32)
    for digest in "abcd":
        put(table, digest, 8)
    table.pin("a")
    table.unpin("a")
    assert [place.leaving for place in table.choices(8)] == [("b",), ("c",), ("d",), ("a",)]
    assert table.choices(16) == [Place(Slot(16, 1), ("c", "d")), Place(Slot(16, 0), ("b", "a"))]
    assert table.choices(32) == [Place(Slot(32, 0), ("b", "c", "d", "a"))]
    assert table.choices(64) == []


def test_a_low_rank_may_take_the_place_of_a_high_one() -> None:
    table = SlotTable(4, 32)
    put(table, "wide", 32)
    assert table.choices(8) == [Place(Slot(8, row), ("wide",)) for row in range(4)]


def test_no_more_digests_than_asked_for_are_resident_though_pages_are_free() -> None:
    table = SlotTable(4, 32, most=2)
    put(table, "a", 8)
    put(table, "b", 8)
    assert table.choices(16) == [Place(Slot(16, 1), ("a",)), Place(Slot(16, 1), ("b",))]
    assert table.choices(32) == [Place(Slot(32, 0), ("a", "b"))]


def test_a_pinned_digest_cannot_be_evicted() -> None:
    table = SlotTable(1, 8)
    put(table, "a", 8)
    table.pin("a")
    table.pin("a")
    table.unpin("a")
    with pytest.raises(AssertionError, match="pinned 1 times"):
        table.evict("a")
    table.unpin("a")
    table.evict("a")
    assert len(table) == 0


def test_pages_behind_a_row_are_of_its_slot_and_of_no_other() -> None:
    table = SlotTable(8, 32)
    [place] = table.choices(16, 1)
    table.place("a", place.slot)
    assert (place, table.used_pages) == (Place(Slot(16, 0, 1), ()), 3)
    assert put(table, "b", 16) == Slot(16, 2), "page 2 is not free, and page 3 begins no row of 2"
    assert put(table, "c", 8) == Slot(8, 3)
    assert table.choices(32, 1) == [Place(Slot(32, 0, 1), ("a", "b", "c"))]
    assert table.choices(8, 4) == [
        Place(Slot(8, 0, 4), ("a", "b", "c")),
        Place(Slot(8, 1, 4), ("a", "b", "c")),
        Place(Slot(8, 2, 4), ("a", "b", "c")),
        Place(Slot(8, 3, 4), ("b", "c")),
    ]
    assert table.choices(32, 5) == [], "more than there is"


def test_no_two_digests_ever_share_a_page() -> None:
    rng, table = random.Random(0), SlotTable(48, 256, most=20)
    buckets: dict[str, int] = {}
    for step in range(5000):
        bucket = rng.choice(BUCKETS)
        place = rng.choice(table.choices(bucket, rng.choice((0, 0, 1, 3))))
        for digest in place.leaving:
            table.evict(digest)
            del buckets[digest]
        buckets[digest := f"d{step}"] = bucket
        table.place(digest, place.slot)
        if rng.random() < 0.3:
            table.evict(gone := rng.choice(list(buckets)))
            del buckets[gone]
        pages = [page for d in buckets for page in table.slot_of(d).pages]
        assert len(set(pages)) == len(pages) == table.used_pages <= 48
        assert all(page < 48 for page in pages)
        assert all(table.slot_of(d).bucket == b for d, b in buckets.items())
        assert len(table) <= 20
