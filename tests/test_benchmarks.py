"""What benchmarks make of their figures: tables, pictures, and runs that were broken off."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kv_memory, peers, scale
from benchmarks.floor import Limits, Sizes, floor
from benchmarks.journal import Journal
from benchmarks.peer_servers import Peer
from benchmarks.plots import Bar, Plot, draw_bars, draw_dots, picture
from benchmarks.workload import OUTPUT_TOKENS, Cell, Figures
from serving.engine import core

CELL, OTHER = Cell(8, 0, 32), Cell(32, 32, 64)
SIZES = Sizes(layers=1000, head=100, adapter=10, kv=4)
LIMITS = Limits(1e6, {8: 1e9, 32: 1e9, 512: 1e9})
OURS = Peer(peers.OURS, "", (False, True))
THEIRS = Peer("other", "other {base} {port}", (False,))
OWN = SimpleNamespace(dtype=torch.bfloat16)  # operators that nobody calls
DRESSED = Peer("other", "other {base} {port} {adapters}", (True,))  # the same with adapters


def figures(rate: float) -> Figures:
    names = Figures.__dataclass_fields__
    return Figures(**dict.fromkeys(names, 1.0) | {"tokens_per_second": rate})


def results(path: Path) -> peers.Results:
    return peers.Results(Journal(path, "a machine"))


def test_a_table_of_peers_has_what_was_measured_before_it_was_broken_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first = results(path)
    assert first.limits() == "none measured"
    for repeat, rate in enumerate((90.0, 100.0, 120.0)):
        turns = {"wardrobe": peers.Turn(figures(rate), LIMITS)}
        turns["other"] = peers.Turn(figures(rate / 4), LIMITS)
        first.add(CELL, repeat, turns)
    again = results(path)
    assert again.turns == first.turns
    rounds = [(cell, repeat) for cell in (CELL, OTHER) for repeat in range(3)]
    assert again.missing(rounds, [OURS, THEIRS]) == [(OTHER, repeat) for repeat in range(3)]
    lines = peers.table(again, [OURS, THEIRS, DRESSED], [CELL, OTHER], SIZES).splitlines()
    ours, theirs = lines[2:]
    assert ours.startswith("| 8 | 0 | wardrobe | 100 (90–120) |")
    assert theirs.startswith("| 8 | 0 | other | 25 (22–30) |")
    assert f"| 4.00 | {25 / floor(CELL, SIZES, LIMITS):.2f} |" in theirs


def test_a_share_of_the_floor_is_of_the_limits_of_its_own_turn(tmp_path: Path) -> None:
    """A host's speed changes: each rate goes with what the machine reached just before."""
    one = results(tmp_path / "results.jsonl")
    faster = Limits(2 * LIMITS.read, {rows: 2 * rate for rows, rate in LIMITS.rates.items()})
    for repeat, (rate, limits) in enumerate(((50.0, LIMITS), (100.0, faster), (60.0, LIMITS))):
        one.add(CELL, repeat, {"wardrobe": peers.Turn(figures(rate), limits)})
    share = 50 / floor(CELL, SIZES, LIMITS)
    line = peers.table(one, [OURS], [CELL], SIZES).splitlines()[2]
    assert line.endswith(f"| {share:.2f} |")
    assert one.limits().startswith("0.0 (0.0–0.0) GB/s read; bfloat16 GFLOP/s: 1 (1–2) at 8 rows")


def test_results_of_an_older_form_are_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Journal(path, "a machine").write({"limits": {"read": 1.0, "rates": {}}})
    with pytest.raises(SystemExit, match=r"results\.jsonl is of an older form.*--results"):
        results(path)


def test_the_floor_falls_with_what_is_read_and_multiplied() -> None:
    """By hand: 8 clients read 2 · (1100 + 8 · 160 · 4) bytes a step, at 1 MB/s."""
    step, prompt = 2 * (1100 + 8 * 160 * 4) / 1e6, 2 * 128 * 1000 / 1e9
    wanted = OUTPUT_TOKENS * 8 / (8 * prompt + (OUTPUT_TOKENS - 1) * step)
    assert floor(CELL, SIZES, LIMITS) == pytest.approx(wanted)
    assert floor(Cell(8, 8, 32), SIZES, LIMITS) < wanted


@pytest.mark.parametrize("compiler", [True, False])
def test_limits_are_measured_with_a_compiler_and_without(
    compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        monkeypatch.setattr("benchmarks.floor.own_operators", lambda: None)
    limits = Limits.measure()
    assert limits.read > 0
    assert limits.rates.keys() == {8, 32, 512}
    assert all(rate > 0 for rate in limits.rates.values())


@pytest.mark.parametrize(("library", "read", "seconds"), [(OWN, 128, 1.0), (None, 64, 2.0)])
def test_limits_are_those_of_the_faster_one(
    library: object, read: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum of 256 MiB in 4 s, 128 MiB of our own weights in 1; products in 2 s and in 1."""
    clock = iter([4.0, *([1.0] if library else []), *([2.0, 1.0] if library else [2.0]) * 3])
    monkeypatch.setattr("benchmarks.floor.own_operators", lambda: library)
    monkeypatch.setattr("benchmarks.floor.fastest", lambda call, repeats: next(clock))
    limits = Limits.measure()
    assert limits.read == read << 20
    assert limits.rates == {rows: 2 * rows * 2048**2 / seconds for rows in (8, 32, 512)}


def test_scale_compares_with_one_adapter_repeat_by_repeat() -> None:
    def phase(rate: float, loads: int) -> scale.Phase:
        return scale.Phase(room=5, distinct=9, loads=loads, figures=figures(rate))

    pairs = [
        (phase(100, 0), phase(90, 3)),
        (phase(50, 0), phase(48, 4)),
        (phase(80, 0), phase(40, 5)),
    ]
    line = scale.report([pairs]).splitlines()[2]
    assert line.startswith("| 5 | 9 | 4 | 48 | 80 | 0.90 (0.50–0.96) |")


def test_pictures_say_their_figures_and_come_out_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    groups = {"8 clients, base": {"ours": Bar.of([90, 100, 120]), "theirs": Bar(25, note=" (4 ×)")}}
    drawn: list[bytes] = []
    for name in ("a.svg", "b.svg"):
        draw_bars(Plot(tmp_path / name, "two machines"), "tokens a second", groups)
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    text = drawn[0].decode()
    for each in ("8 clients, base", " 100", " 25 (4 ×)", "theirs", "tokens a second"):
        assert each in text
    draw_dots(Plot(tmp_path / "c.png", "dots"), "ms", {"one": [1.0, 2.0], "two": [3.0]})
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("plot.pdf", r"neither \.svg nor \.png"), ("no/plot.svg", "no folder 'no'")],
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        picture(name)


def test_less_is_read_twice_where_more_memory_is_kept_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core, "SOON", core.SOON)  # the benchmark sets it
    none, much = (kv_memory.run(12, 8, 0.25, soon) for soon in (0, 16))
    assert none.paused > much.paused == 0
    assert none.again > much.again == 0
    assert none.running > much.running
