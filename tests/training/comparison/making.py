"""Rows of a comparison, drawn at random with known truth."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from training.comparison.result import (
    Comparison,
    Cost,
    Forgetting,
    LeftOut,
    Point,
    Row,
    RunScore,
    Searched,
    Setup,
    Strategy,
)
from training.comparison.significance import compare_rows
from training.comparison.verdict import decide


def row(name: str, runs: Sequence[Sequence[float]], strategy: Strategy = "LoRA", **facts) -> Row:
    """Make a row of values given as [run][item]."""
    cost = facts.pop("cost", Cost(prompt_tokens=30.0, bytes=1000))
    scores = tuple(RunScore(seed=n, values=tuple(map(float, run))) for n, run in enumerate(runs))
    return Row(name=name, strategy=strategy, settings="", runs=scores, cost=cost, **facts)


def drawn_rows(
    generator: np.random.Generator,
    shares: Sequence[float],
    *,
    items: int,
    seeds: int = 1,
    seed_spread: float = 0.0,
) -> list[Row]:
    """Draw rows of right and wrong answers: items differ in difficulty, runs in luck.

    An item's chance is the row's share moved by the item and by the run, both normal on the scale
    of log odds and centred so that the first row is no better than an equal second one.
    """
    difficulty = generator.normal(0, 1, items)
    rows: list[Row] = []
    for number, share in enumerate(shares):
        luck = generator.normal(0, seed_spread, (seeds, 1))
        chance = 1 / (1 + np.exp(-(np.log(share / (1 - share)) + difficulty + luck)))
        values = generator.random((seeds, items)) < chance
        rows.append(row(f"row {number}", values, "prompt" if number == 0 else "LoRA"))
    return rows


def sample_comparison(seeds: int = 1) -> Comparison:
    """A table of the usual rows, with every part filled."""
    generator = np.random.default_rng(4)
    names: list[tuple[str, Strategy, float, float, float]] = [
        ("base prompt", "prompt", 0.02, 30, 0.8),
        ("few-shot", "few-shot", 0.12, 320, 0.8),
        ("LoRA", "LoRA", 0.47, 30, 0.15),
        ("LoRA + replay", "replay", 0.46, 30, 0.75),
        ("rsLoRA", "PEFT variant", 0.44, 30, 0.1),
        ("prompt tuning", "PEFT variant", 0.2, 50, 0.4),
        ("full fine-tune", "full", 0.55, 30, 0.05),
        ("full → r 64", "extracted", 0.56, 30, 0.02),
    ]
    drawn = drawn_rows(generator, [share for _, _, share, _, _ in names], items=60, seeds=seeds)
    rows: list[Row] = []
    for (name, strategy, _, tokens, kept), one in zip(names, drawn, strict=True):
        trained = strategy not in ("prompt", "few-shot")
        cost = Cost(
            prompt_tokens=tokens,
            trainable=4_884_480 if trained else 0,
            bytes=19_600_000 if trained else 800,
            train_flops=2e13 if trained else 0.0,
            cpu_seconds=120.0 if trained else 0.0,
            search_cpu_seconds=360.0 if trained else 0.0,
            peak_bytes=2_100_000_000 if trained else None,
        )
        rows.append(
            replace(
                one,
                name=name,
                strategy=strategy,
                cost=cost,
                settings="lr 1e-3, r 16" if trained else "8 examples, with the list of labels",
                hot_swaps=name != "full fine-tune",
                details={"valid_json": 0.97, "slot_f1": one.value},
                forgetting=Forgetting(
                    perplexity=18.2,
                    qa_accuracy=kept,
                    qa_low=kept * 0.8,
                    qa_high=min(1, kept + 0.1),
                    format_leak=1 - kept,
                    kl=0.2,
                ),
                ship="wardrobe train adapters/smart-home --set train.learning_rate=1e-3 --push",
            )
        )
    groups = tuple(range(60))
    pairs = tuple(compare_rows(rows, groups))
    points = [
        Point(series=name, x=x, runs=drawn_rows(generator, [share], items=60)[0].runs)
        for name, shares in (
            ("LoRA", (0.1, 0.3, 0.4, 0.47)),
            ("full → LoRA", (0.3, 0.4, 0.5, 0.55)),
        )
        for x, share in zip((4, 16, 64, 256), shares, strict=True)
    ]
    return Comparison(
        setup=Setup(
            recipe="home/smart-home",
            base="HuggingFaceTB/SmolLM2-135M-Instruct",
            parameters=134_515_008,
            metric="json",
            train_examples=280,
            validation_examples=40,
            held_out_examples=60,
            steps=60,
            batch_size=8,
            seeds=seeds,
            quick=True,
            date="2026-11-25",
            machine="2 cores of AMD EPYC, bfloat16",
            versions={"torch": "2.13.0", "peft": "0.21.2"},
            data_sha256="ab" * 32,
            minutes=7.4,
        ),
        rows=tuple(rows),
        pairs=pairs,
        verdict=decide(rows, pairs, groups),
        groups=groups,
        near=tuple(n % 2 == 0 for n in range(60)),
        searched=(
            Searched(row="LoRA", learning_rate=5e-4, value=0.4, chosen=False),
            Searched(row="LoRA", learning_rate=1e-3, value=0.45, chosen=True),
        ),
        by_examples=tuple(
            replace(point, x=point.x * 4) for point in points if point.series == "LoRA"
        ),
        by_rank=tuple(points),
        losses={
            name: tuple((step, 5 * 0.93**step + 0.1 * scale) for step in range(1, 61))
            for name, scale in (("LoRA", 1), ("full fine-tune", 2), ("LoRA + replay", 3))
        },
        left_out=(LeftOut(cell="DoRA, seed 0", reason="no time left of 8 minutes"),),
    )
