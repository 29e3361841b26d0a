"""The comparison itself: train every method fairly, ask the held-out items once, decide.

Learning rates are chosen on the validation side; the held-out side is asked for the chosen runs
only. Every cell is a run that is found again, so an interrupted comparison goes on.
"""

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from training.comparison.bench import Bench, Cell, Judged
from training.comparison.cost import cost_of_prompt, cost_of_run, parameters_of
from training.comparison.entries import Curve, Entry, Trained, train_all
from training.comparison.plan import Plan, count_cells
from training.comparison.result import Comparison, Point, Row, RunScore, Setup
from training.comparison.significance import compare_rows, groups_of
from training.comparison.verdict import decide
from training.evaluation.evaluate import near_duplicates
from training.evaluation.general import general_of
from training.run import Run


def compare(bench: Bench, plan: Plan) -> Comparison:
    """Run what is left of a plan and return the whole.

    Raises what training and the engine raise; the same call goes on from there.
    """
    bench.expect(count_cells(bench.recipe, plan))
    made = train_all(bench, plan)
    rows, curves = rows_of(bench, made)
    general = general_of(bench.recipe)
    untouched, *kept = bench.forgetting(
        [entry.variants[0] for entry in made.entries], general.half() if plan.quick else general
    )
    rows = [replace(row, forgetting=one) for row, one in zip(rows, kept, strict=True)]
    groups = groups_of(bench.data.held_out)
    pairs = compare_rows(rows, groups)
    return Comparison(
        setup=setup_of(bench, plan),
        rows=tuple(rows),
        pairs=tuple(pairs),
        verdict=decide(rows, pairs, groups, untouched),
        untouched=untouched,
        groups=groups,
        near=tuple(near_duplicates(bench.data)),
        searched=tuple(made.searched),
        by_examples=tuple(curves["examples"]),
        by_rank=tuple(curves["rank"]),
        losses={entry.name: line for entry in made.entries if (line := losses_of(entry.cells))},
        left_out=tuple(bench.left_out),
    )


def rows_of(bench: Bench, made: Trained) -> tuple[list[Row], dict[Curve, list[Point]]]:
    """Ask the held-out items for everything that was trained, in one mixed batch a model."""
    items = bench.data.held_out
    variants = [variant for entry in made.entries for variant in entry.variants]
    of_points = [variant for point in made.points for variant in point.variants]
    judged = iter(bench.judge([*variants, *of_points], items))
    rows = [_row(bench, entry, [next(judged) for _ in entry.variants]) for entry in made.entries]
    curves: dict[Curve, list[Point]] = {"examples": [], "rank": []}
    for point in made.points:
        runs = _runs([next(judged) for _ in point.variants])
        curves[point.curve].append(Point(series=point.series, x=point.x, runs=runs))
    return rows, curves


def losses_of(cells: Sequence[Cell]) -> tuple[tuple[int, float], ...]:
    """Return (step, loss) of the first of these runs; an extraction and a prompt have none."""
    lines = Run(cells[0].run, {}).read_metrics() if cells else []
    return tuple((line["step"], line["loss"]) for line in lines if "loss" in line)


def setup_of(bench: Bench, plan: Plan) -> Setup:
    recipe, data, hardware = bench.recipe, bench.data, bench.hardware
    return Setup(
        recipe=recipe.name,
        base=bench.base.id,
        parameters=parameters_of(bench.base),
        metric=recipe.task.metric,
        train_examples=len(data.train),
        validation_examples=len(data.validation),
        held_out_examples=len(data.held_out),
        steps=recipe.train.steps,
        batch_size=recipe.train.batch_size,
        seeds=plan.seeds,
        quick=plan.quick,
        date=datetime.now(UTC).date().isoformat(),
        machine=f"{processor()}, {hardware.threads} threads, base in {hardware.dtype}",
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        data_sha256=data.digest,
        minutes=bench.seconds / 60,
    )


def processor() -> str:
    """Return the name of the processor where the system tells it, else of its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _row(bench: Bench, entry: Entry, judged: Sequence[Judged]) -> Row:
    tokens = judged[0].prompt_tokens
    variant = entry.variants[0]
    if entry.cells:
        cost = cost_of_run(bench, entry.cells[0], entry.searched, tokens)
    else:
        cost = cost_of_prompt(variant.system, variant.examples, tokens)
    return Row(
        name=entry.name,
        strategy=entry.strategy,
        settings=entry.settings,
        runs=_runs(judged),
        cost=cost,
        hot_swaps=entry.hot_swaps,
        details=_means([found.details for found in judged]),
        ship=entry.ship,
    )


def _runs(judged: Sequence[Judged]) -> tuple[RunScore, ...]:
    return tuple(RunScore(seed=place, values=found.values) for place, found in enumerate(judged))


def _means(details: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in details) / len(details) for key in details[0]}
