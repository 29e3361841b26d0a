"""The rows of a comparison in the making: what is trained, and in which order.

Learning rates are chosen on the validation side.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from registry.contents import MODEL_NAME
from training.comparison.bench import Bench, Cell
from training.comparison.plan import (
    EXTRACTED,
    EXTRACTED_ROW,
    NAMES,
    PARTS,
    RANKS,
    REPLAY,
    Contender,
    Plan,
    at_rank,
    contenders,
    quick_prompts,
    seeds_of,
)
from training.comparison.result import Searched, Strategy
from training.data.examples import Data, digest_examples
from training.evaluation.evaluate import Variant
from training.fewshot.hint import hint_of
from training.fewshot.measure import choose, measure
from training.fewshot.shots import shots_of, usable
from training.recipe import Recipe, apply_overrides

Curve = Literal["examples", "rank"]


@dataclass(slots=True)
class Entry:
    """A row in the making: a variant for each of its runs, and the cells behind them."""

    name: str
    strategy: Strategy
    settings: str
    variants: list[Variant]
    cells: list[Cell] = field(default_factory=list[Cell])  # none for a prompt
    searched: list[Cell] = field(default_factory=list[Cell])
    ship: str = ""

    @property
    def hot_swaps(self) -> bool:
        """Tell whether one request of a mixed batch can wear it."""
        return not self.cells or not (self.cells[0].adapter / MODEL_NAME).is_file()


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a curve in the making."""

    curve: Curve
    series: str
    x: float
    variants: tuple[Variant, ...]


@dataclass(slots=True)
class Trained:
    """What the training part of a comparison made."""

    entries: list[Entry] = field(default_factory=list[Entry])
    points: list[CurvePoint] = field(default_factory=list[CurvePoint])
    searched: list[Searched] = field(default_factory=list[Searched])


def train_all(bench: Bench, plan: Plan) -> Trained:
    """Train every cell of the plan that the minutes allow, the most telling first.

    First every method with one seed, then what is made of them, then curves and further seeds: when
    time ends early, the table is whole and only its detail is missing.
    """
    made = Trained(prompts_of(bench, plan))
    chosen: dict[str, Entry] = {}
    for contender in contenders(bench.recipe, plan.methods, quick=plan.quick):
        entry = _search(bench, contender, made, plan)
        if entry is None:
            continue
        chosen[contender.method] = entry
        made.entries.append(entry)
        if contender.method == "lora" and "replay" in plan.methods:
            made.entries += _with_replay(bench, entry, plan)
        if contender.method == "full" and "extract" in plan.methods:
            made.entries.append(_extracted(bench, entry, made, plan))
    if "lora" in chosen and not plan.quick:
        _curves(bench, chosen["lora"], made)
    for entry in [entry for entry in made.entries if entry.cells]:
        _more_seeds(bench, entry, plan.seeds)
    return made


def prompts_of(bench: Bench, plan: Plan) -> list[Entry]:
    """Return the prompts: the recipe's own, with the list of answers, and with examples.

    How many examples, and whether the list helps them, is chosen by validation. Every draw of the
    examples is a run of its own: which ones are shown changes much.
    """
    system = bench.recipe.task.system
    base = Variant("base prompt", bench.base, system)
    entries = [Entry("base prompt", "prompt", "system text only", [base])]
    if "fewshot" not in plan.methods:
        return entries
    recipe, train = quick_prompts(bench.recipe) if plan.quick else bench.recipe, bench.data.train
    if hint := hint_of(recipe.fewshot, train):
        listed = Variant("base prompt + list", bench.base, f"{system}\n{hint}")
        entries.append(Entry(listed.name, "few-shot", "possible answers listed", [listed]))
    found = measure(recipe, bench.data, bench.base, answer=bench.answer, progress=bench.progress)
    shown = [measured for measured in found.measurements if measured.cell.k]
    if not shown:
        return entries
    best, settings = choose(shown).cell, recipe.fewshot
    name, text = f"few-shot, {best.k} examples", f"{system}\n{hint}" if best.listed else system
    draws = [
        shots_of(usable(train), best.k, settings, f"{recipe.seed}:{draw}")
        for draw in range(settings.draws)
    ]
    variants = [Variant(name, bench.base, text, None, shots) for shots in draws]
    chosen = f"{settings.choose}{', possible answers listed' if best.listed else ''}"
    ship = f"{plan.train} --set method.kind=fewshot --push"
    entries.append(Entry(name, "few-shot", chosen, variants, ship=ship))
    return entries


def _search(bench: Bench, contender: Contender, made: Trained, plan: Plan) -> Entry | None:
    """Train the grid of a contender and choose by validation; the first of equals wins."""
    cells = [
        cell
        for recipe in contender.recipes
        if (cell := bench.train(_cell_name(contender.name, recipe), recipe))
    ]
    if not cells:
        return None
    judged = bench.judge(
        [bench.variant(cell, contender.name) for cell in cells], bench.data.validation
    )
    best = max(range(len(cells)), key=lambda place: judged[place].mean)
    for place, (cell, found) in enumerate(zip(cells, judged, strict=True)):
        rate = cell.recipe.train.learning_rate
        made.searched.append(
            Searched(row=contender.name, learning_rate=rate, value=found.mean, chosen=place == best)
        )
    return _entry(bench, contender.name, contender.strategy, cells[best], cells, plan)


def _with_replay(bench: Bench, lora: Entry, plan: Plan) -> list[Entry]:
    """Train LoRA again at its chosen rate with the base's own answers among the rows."""
    recipe = apply_overrides(lora.cells[0].recipe, [REPLAY])
    bench.remember_replay(recipe)
    cell = bench.train(_cell_name(NAMES["replay"], recipe), recipe)
    if cell is None:
        return []
    entry = _entry(bench, NAMES["replay"], "replay", cell, [*lora.searched, cell], plan)
    entry.ship = lora.ship.replace(" --push", f" --set {REPLAY} --push")
    return [entry]


def _extracted(bench: Bench, full: Entry, made: Trained, plan: Plan) -> Entry:
    """Take the full fine-tune apart at several ranks; the usual one is a row of its own."""
    name = NAMES["extract"]
    ranks = (EXTRACTED_ROW,) if plan.quick else EXTRACTED
    cells = {rank: bench.extract(full.cells[0], rank) for rank in ranks}
    for rank, cell in cells.items():
        made.points.append(CurvePoint("rank", name, rank, (bench.variant(cell, name),)))
    cell = cells[EXTRACTED_ROW]
    entry = _entry(bench, f"{name} r {EXTRACTED_ROW}", "extracted", cell, full.searched, plan)
    entry.settings += f", then SVD at rank {EXTRACTED_ROW}"
    entry.ship = f"wardrobe extract {full.cells[0].run} --rank {EXTRACTED_ROW} --push"
    return entry


def _curves(bench: Bench, lora: Entry, made: Trained) -> None:
    """Train LoRA at its chosen rate with fewer examples, and at other ranks."""
    recipe, examples = lora.cells[0].recipe, bench.data.train
    name = lora.name
    for part in PARTS:
        count = max(1, round(part * len(examples)))
        fewer = _fewer(bench.data, count)
        if cell := bench.train(f"{name}, {count} examples", recipe, fewer):
            point = CurvePoint("examples", name, count, (bench.variant(cell, name),))
            made.points.append(point)
    made.points.append(CurvePoint("examples", name, len(examples), (lora.variants[0],)))
    for rank in RANKS:
        if rank == recipe.method.r:
            continue
        if cell := bench.train(f"{name}, rank {rank}", at_rank(recipe, rank)):
            made.points.append(CurvePoint("rank", name, rank, (bench.variant(cell, name),)))
    made.points.append(CurvePoint("rank", name, recipe.method.r, (lora.variants[0],)))


def _more_seeds(bench: Bench, entry: Entry, seeds: int) -> None:
    recipe = entry.cells[0].recipe
    for seed in seeds_of(recipe, seeds)[1:]:
        again = replace(recipe, seed=seed)
        if cell := bench.train(f"{entry.name}, seed {seed}", again):
            if entry.strategy == "extracted":
                cell = bench.extract(cell, EXTRACTED_ROW)
            entry.cells.append(cell)
            entry.variants.append(bench.variant(cell, entry.name))


def _entry(
    bench: Bench,
    name: str,
    strategy: Strategy,
    cell: Cell,
    searched: Sequence[Cell],
    plan: Plan,
) -> Entry:
    changed = changes(bench.recipe, cell.recipe)
    sets = "".join(f" --set {change}" for change in changed)
    return Entry(
        name,
        strategy,
        f"lr {cell.recipe.train.learning_rate:.2g}",
        [bench.variant(cell, name)],
        [cell],
        list(searched),
        f"{plan.train}{sets} --push",
    )


def _fewer(data: Data, count: int) -> Data:
    """Return the data with the first training examples only; their order is drawn by the seed."""
    train = data.train[:count]
    return replace(data, train=train, digest=digest_examples(train, data.held_out, data.validation))


def _cell_name(name: str, recipe: Recipe) -> str:
    return f"{name}, lr {recipe.train.learning_rate:.2g}"


def changes(original: Recipe, recipe: Recipe) -> list[str]:
    """Return the overrides that make one recipe of the other, the kind of method first."""
    before, after = _flat(asdict(original)), _flat(asdict(recipe))
    changed = [key for key in after if after[key] is not None and before.get(key) != after[key]]
    used = [
        key
        for key in sorted(changed, key=lambda key: key != "method.kind")
        if not key.startswith("method.") or key.removeprefix("method.") in recipe.method.settings
    ]
    return [f"{key}={after[key]}" for key in used]


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{before}{key}.") if isinstance(item, dict) else {before + key: item}
    return flat
