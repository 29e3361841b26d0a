"""The whole of a comparison on a tiny base, with an oracle in place of the engine."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from registry.base import BaseModel
from training.card import read_card
from training.comparison.bench import Bench
from training.comparison.compare import compare
from training.comparison.cost import trainable_parameters
from training.comparison.entries import changes
from training.comparison.page import write_report
from training.comparison.plan import (
    TRAINED,
    Plan,
    at_rank,
    at_rate,
    check_methods,
    contenders,
    count_cells,
)
from training.comparison.space import chooser, parse_space
from training.comparison.sweep import Sweep, sweep
from training.data.examples import Data, ask, digest_examples
from training.errors import RecipeError, RunFailed
from training.evaluation.evaluate import Ask
from training.evaluation.general import load_general
from training.model import Hardware, detect_hardware, load_model
from training.recipe import Method, MethodKind, Recipe, apply_overrides


class Oracle:
    """Answers by a rule and counts: the base is always wrong, whoever was trained is right.

    The adapter with the higher learning rate answers the first of every three questions only.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], Path | None]] = []

    def __call__(
        self,
        model: BaseModel,
        asks: Sequence[Ask],
        max_new_tokens: int,
        done: Callable[[int], None],
    ) -> list[list[int]]:
        self.asked += asks
        done(len(asks))
        return [self._answer(*one, place) for place, one in enumerate(asks)]

    def _answer(self, prompt: tuple[int, ...], adapter: Path | None, place: int) -> list[int]:
        if adapter is None:
            return list(b"no")
        question = bytes(token for token in prompt if token < 256).decode()
        right = "green" if "odd" in question else "blue"
        rate = read_card(adapter)["recipe"]["train"]["learning_rate"]
        return list((right if rate < 0.015 or place % 3 == 0 else "no").encode())


@pytest.fixture
def sides() -> Data:
    def some(start: int, count: int) -> tuple:
        numbers = range(start, start + count)
        return tuple(
            ask(f"{'odd' if n % 2 else 'even'} {n}", "green" if n % 2 else "blue", str(n))
            for n in numbers
        )

    train, validation, held_out = some(0, 12), some(100, 9), some(200, 24)
    digest = digest_examples(train, held_out, validation)
    return Data(train, held_out, 0, digest, validation)


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    return apply_overrides(recipe, ["train.steps=2", "method.dropout=0.0"])


def bench_in(
    folder: Path, recipe: Recipe, data: Data, base: BaseModel, oracle: Oracle, **facts
) -> Bench:
    return Bench(
        recipe,
        data,
        base,
        runs=folder / "runs",
        folder=folder / "comparisons",
        hardware=detect_hardware(),
        answer=oracle,
        progress=facts.pop("progress", lambda _: None),
        minutes=facts.pop("minutes", None),
    )


def plan_of(*methods: str, seeds: int = 1, minutes: float | None = None) -> Plan:
    return Plan(check_methods(methods), seeds, True, minutes, "wardrobe train adapters/colours")


def test_a_comparison_chooses_by_validation_asks_once_and_is_found_again(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    oracle, told = Oracle(), []
    bench = bench_in(tmp_path, short, sides, tiny_base, oracle, progress=told.append)
    found = compare(bench, plan_of("lora", seeds=2))
    lora, base = found.row("LoRA"), found.row("base prompt")
    assert [tried.chosen for tried in found.searched] == [True, False]  # 0.01 is right, 0.02 not
    assert (base.value, lora.value) == (0.0, 1.0)
    assert [run.seed for run in lora.runs] == [0, 1]
    assert found.verdict.winner == "LoRA" == found.verdict.ship
    assert (lora.cost.peak_bytes or 0) > 50e6
    assert (lora.cost.search_cpu_seconds or 0) > (lora.cost.cpu_seconds or 0) > 0
    # validation: two rates; held out: the base, the chosen rate, its second seed; general
    # questions: the base itself and each row; nothing else
    general = len(load_general().half().questions)  # the plan is a quick one
    assert len(oracle.asked) == 2 * 9 + 3 * 24 + 3 * general
    assert lora.forgetting
    assert found.untouched
    assert (lora.forgetting.format_leak, found.untouched.format_leak) == (1.0, 0.0)
    cells = [p for p in told if p.stage == "compare"]
    assert (cells[-1].done, cells[-1].total) == (3, 3)
    assert write_report(tmp_path / "report", found).is_file()

    before = len(oracle.asked)
    again = compare(bench_in(tmp_path, short, sides, tiny_base, oracle), plan_of("lora", seeds=2))
    assert len(oracle.asked) == before
    assert again.rows == found.rows


def test_every_strategy_has_its_row(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    """Prompts with and without list and examples, LoRA, self-replay, full, and its extraction."""
    bench = bench_in(tmp_path, short, sides, tiny_base, Oracle())
    found = compare(bench, plan_of("fewshot", "lora", "replay", "full", "extract"))
    assert [(row.name, row.strategy, row.hot_swaps) for row in found.rows] == [
        ("base prompt", "prompt", True),
        ("base prompt + list", "few-shot", True),
        ("few-shot, 4 examples", "few-shot", True),
        ("LoRA", "LoRA", True),
        ("LoRA + self-replay", "replay", True),
        ("full fine-tune", "full", False),
        ("full, extracted r 64", "extracted", True),
    ]
    full, extracted = found.row("full fine-tune"), found.row("full, extracted r 64")
    assert (extracted.cost.cpu_seconds or 0) >= (full.cost.cpu_seconds or 0) > 0
    assert "replay.share=0.125" in found.row("LoRA + self-replay").ship
    assert write_report(tmp_path / "report", found).is_file()


def test_what_the_minutes_leave_out_is_named(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    bench = bench_in(tmp_path, short, sides, tiny_base, Oracle(), minutes=1e-6)
    found = compare(bench, plan_of("lora", "full", minutes=1e-6))
    assert [row.name for row in found.rows] == ["base prompt"]
    assert [left.cell for left in found.left_out] == [
        "LoRA, lr 0.01",
        "LoRA, lr 0.02",
        "full fine-tune, lr 0.001",
        "full fine-tune, lr 0.002",
    ]


def test_what_the_machine_cannot_run_is_named(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    bench = bench_in(tmp_path, short, sides, tiny_base, Oracle())
    bench.hardware = Hardware("cpu", "float32", 1)
    assert bench.train("QLoRA", at_rate(short, "qlora", 1.0)) is None
    assert "CUDA" in bench.left_out[0].reason


def test_a_run_that_fails_says_why(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    recipe = apply_overrides(short, ["train.max_length=20"])
    bench = bench_in(tmp_path, recipe, sides, tiny_base, Oracle())
    with pytest.raises(RunFailed, match="max_length"):
        compare(bench, plan_of("lora"))


def test_a_sweep_keeps_the_best_by_validation_with_its_lineage(
    tmp_path: Path, short: Recipe, sides: Data, tiny_base: BaseModel
) -> None:
    recipe, space = parse_space(short, ["train.learning_rate=2e-2,1e-2", "method.r=2,4"])
    oracle = Oracle()

    def run() -> Sweep:
        bench = bench_in(tmp_path, recipe, sides, tiny_base, oracle)
        return sweep(bench, space, "grid", chooser(space, "grid", None, 0), 4)

    first, found = run(), run()  # the second finds all again
    assert first == found
    assert len(oracle.asked) == 4 * 9
    assert found.best.trial == ("train.learning_rate=1e-2", "method.r=2")
    lineage = read_card(found.best.cell.adapter)["lineage"]["sweep"]
    assert (lineage["chosen"], lineage["trials"]) == (True, 4)
    assert lineage["space"]["method.r"] == {"values": ["2", "4"]}


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind not in ("eva", "qlora")])
def test_the_parameters_trained_are_counted_without_loading_the_base(
    kind: MethodKind, tiny_base: BaseModel
) -> None:
    method = Method(kind=kind, r=4)
    model = load_model(tiny_base.path, method, detect_hardware(), 0, [])
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trainable_parameters(tiny_base, method) == trained


def test_each_method_has_a_grid_around_a_rate_of_its_own(recipe: Recipe) -> None:
    grids = {
        contender.method: [r.train.learning_rate for r in contender.recipes]
        for contender in contenders(recipe, ("lora", "full", "ia3"), quick=False)
    }
    assert grids["lora"] == pytest.approx([0.003, 0.01, 0.03])
    assert grids["full"] == pytest.approx([0.0003, 0.001, 0.003])
    assert grids["ia3"] == pytest.approx([0.03, 0.1, 0.3])


def test_a_recipe_of_a_full_fine_tune_has_the_same_grids(recipe: Recipe) -> None:
    full = at_rate(recipe, "full", 1.0)
    assert at_rate(full, "lora", 1.0).train.learning_rate == recipe.train.learning_rate


def test_another_rank_keeps_the_scale(recipe: Recipe) -> None:
    method = at_rank(recipe, 64).method
    assert (method.r, method.alpha) == (64, 128)


def test_the_command_that_ships_names_what_differs(recipe: Recipe) -> None:
    assert changes(recipe, at_rate(recipe, "full", 1.0)) == [
        "method.kind=full",
        "train.learning_rate=0.001",
    ]
    assert changes(recipe, replace(recipe, seed=3)) == ["seed=3"]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(RecipeError, match="'lorra' is no method"):
        check_methods(["lorra"])


def test_the_cells_are_counted_as_they_are_trained(recipe: Recipe) -> None:
    plan = replace(plan_of("lora", "full", seeds=3), quick=False)
    assert (
        count_cells(recipe, plan) == 2 * 3 + 2 * 2 + 3 + 2
    )  # grids, seeds, parts, ranks but its own
