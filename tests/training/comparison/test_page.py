import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.training.comparison.making import sample_comparison
from training.comparison.page import as_markdown, as_page, write_report
from training.comparison.plots import INK, draw_plots
from training.comparison.result import read_comparison
from training.comparison.tables import tables_of

VOID = {"meta", "line", "path", "use", "rect", "br", "link", "image"}


class Reader(HTMLParser):
    """Collects links and ids, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return as_page(sample_comparison())


def test_the_page_loads_nothing_and_is_well_formed(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.loads == []
    assert len(reader.ids) == len(set(reader.ids)) > 0
    assert not re.search(r"url\((?!#)|@import|<script", page)


def test_the_page_begins_with_the_verdict_and_shows_every_row_and_plot(page: str) -> None:
    comparison = sample_comparison()
    assert page.index(comparison.verdict.headline) < page.index("<table")
    assert all(f">{row.name}</td>" in page for row in comparison.rows)
    assert page.count("<figure>") == len(draw_plots(comparison)) == 5
    assert "DoRA, seed 0" in page  # what was left out is named


def test_the_plots_take_their_ink_from_the_page(page: str) -> None:
    assert INK not in page
    assert "currentColor" in page


def test_a_name_with_markup_in_it_stays_text() -> None:
    comparison = sample_comparison()
    rows = (replace(comparison.rows[0], name="<script>alert(1)</script>"), *comparison.rows[1:])
    pairs = tuple(
        replace(pair, second=rows[0].name) if pair.second == "base prompt" else pair
        for pair in comparison.pairs
    )
    page = as_page(replace(comparison, rows=rows, pairs=pairs))
    assert "<script" not in page


def test_the_same_facts_make_the_same_page(page: str) -> None:
    assert as_page(sample_comparison()) == page


def test_a_comparison_comes_back_from_its_json(tmp_path: Path) -> None:
    comparison = sample_comparison(seeds=3)
    write_report(tmp_path, comparison)
    assert read_comparison(tmp_path) == comparison


def test_the_markdown_has_the_verdict_and_every_table() -> None:
    comparison = sample_comparison()
    text = as_markdown(comparison)
    assert comparison.verdict.headline in text
    assert [f"## {table.title}" in text for table in tables_of(comparison)] == [True] * 4


def test_clean_items_and_near_duplicates_are_shown_apart() -> None:
    comparison = sample_comparison()
    shown = tables_of(comparison)[0]
    clean = shown.columns.index("clean items")
    values = zip(comparison.row("LoRA").runs[0].values, comparison.near, strict=True)
    right = [value for value, near in values if not near]
    cell = next(row for row in shown.rows if row[0] == "LoRA")[clean]
    assert cell.startswith(f"{100 * sum(right) / len(right):.1f} %")
