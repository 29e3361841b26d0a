"""Amounts of memory as people write them."""

import pytest

from serving.engine.memory import format_memory, parse_memory


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("7B", 7)]
)
def test_an_amount_of_memory_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "512", "-1GiB", "1GB", "GiB", "1e9", "١GiB", "1.GiB"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("size", "text"), [(1, "1MiB"), (5 << 20, "5MiB"), ((1 << 30) + 1, "1025MiB")]
)
def test_an_amount_is_written_as_it_is_read(size: int, text: str) -> None:
    assert format_memory(size) == text
    assert 0 <= parse_memory(text) - size < 1 << 20
