"""What is followed is read again after a write of anybody's, after a failure, and not otherwise."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.errors import StoreUnavailable
from registry.store import Registry
from serving.latest import Latest
from tests.registry.making import make_adapter
from tests.serving.live import NAME, Wardrobe, opened


def push(wardrobe: Wardrobe) -> Callable[[], None]:
    """Return what writes through a connection of its own, as another process would."""

    def write() -> None:
        with Registry.open(wardrobe.registry.home, wardrobe.registry.bases) as other:
            source = make_adapter(wardrobe.folder / f"adapter-{wardrobe.pushed}", seed=7)
            wardrobe.pushed += 1
            other.push(source, NAME, actor="test")

    return write


def test_a_query_is_asked_again_after_a_write_only(tmp_path: Path) -> None:
    with opened(tmp_path) as wardrobe:
        registry, asked = wardrobe.registry, list[int]()

        def newest() -> int:
            asked.append(registry.last_event())
            return asked[-1]

        async def main() -> None:
            latest = Latest(registry, newest)
            assert [await latest.get() for _ in range(5)] == [0] * 5
            assert len(asked) == 1
            push(wardrobe)()
            first = await latest.get()
            assert first > 0
            assert [await latest.get() for _ in range(5)] == [first] * 5
            wardrobe.promote(1)  # by this registry itself
            assert await latest.get() > first
            assert len(asked) == 3

        asyncio.run(main())


def test_a_query_that_failed_is_asked_again(tmp_path: Path) -> None:
    with opened(tmp_path) as wardrobe:
        answers = iter([StoreUnavailable("the disk is full"), 1, StoreUnavailable("again"), 2])

        def query() -> int:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        async def main() -> None:
            latest = Latest(wardrobe.registry, query)
            with pytest.raises(StoreUnavailable):
                await latest.get()
            assert await latest.get() == 1
            push(wardrobe)()
            with pytest.raises(StoreUnavailable):
                await latest.get()
            assert await latest.get() == 2
            assert await latest.get() == 2

        asyncio.run(main())


def test_the_revision_waits_for_no_writer_and_sees_what_is_committed(tmp_path: Path) -> None:
    with opened(tmp_path) as wardrobe:
        registry = wardrobe.registry
        before = registry.revision()
        assert before is not None
        assert registry.revision() == before
        writer = sqlite3.connect(registry.home / "registry.sqlite", isolation_level=None)
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("CREATE TABLE later (number INTEGER)")
        assert registry.revision() == before, "nothing is committed"
        writer.execute("COMMIT")
        writer.close()
        assert registry.revision() != before
