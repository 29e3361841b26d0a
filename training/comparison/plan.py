"""What is compared: one contender for each way to specialise a base, with the runs it needs.

A learning rate that suits LoRA is about ten times too high for a full fine-tune (J. Schulman and
Thinking Machines Lab, LoRA Without Regret, 2025), so each kind has a grid around a rate of its own.
"""

import hashlib
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from registry.jsonfile import canonical
from training.comparison.result import Strategy
from training.errors import RecipeError
from training.recipe import MethodKind, Recipe, apply_overrides, load_recipe

# kind → its usual learning rate over LoRA's
RATE: dict[str, float] = {
    "full": 0.1,
    "ia3": 10.0,
    "prompt-tuning": 30.0,
    "prefix-tuning": 10.0,
}
GRID, QUICK_GRID = (0.3, 1.0, 3.0), (1.0, 2.0)  # times the usual rate; short runs want higher ones
VALIDATION = 0.15  # of the groups, where the recipe keeps none to choose by
QUICK_MINUTES = 8.0
RANKS = (4, 16, 64)
REPLAY = "replay.share=0.125"  # an eighth of the rows
EXTRACTED = (4, 16, 64, 256)
EXTRACTED_ROW = 64
PARTS = (0.125, 0.25, 0.5)  # of the examples; the whole is the contender's own run
PROMPTS = ("base", "fewshot")
DERIVED = ("extract", "replay")  # made from full, and from LoRA with [replay]
TRAINED: tuple[MethodKind, ...] = tuple(
    kind for kind in get_args(MethodKind) if kind not in PROMPTS
)
METHODS = (*PROMPTS, *TRAINED, *DERIVED)
USUAL = (*PROMPTS, "lora", "replay", "full", "extract", "rslora", "dora", "pissa", "ia3")
QUICK = (*PROMPTS, "lora", "replay", "full", "extract")

NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "IA3",
    "qlora": "QLoRA",
    "prompt-tuning": "prompt tuning",
    "prefix-tuning": "prefix tuning",
    "full": "full fine-tune",
    "extract": "full, extracted",
    "replay": "LoRA + self-replay",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare, and how thoroughly."""

    methods: tuple[str, ...]
    seeds: int
    quick: bool
    minutes: float | None  # for training and asking; None: as long as it takes
    train: str  # the command that trains the recipe as it was given: `wardrobe train RECIPE …`

    def name(self, recipe: Recipe) -> str:
        """Return what the folder of its report is called: another plan never overwrites it."""
        facts = [recipe.digest, self.methods, self.seeds, self.quick]
        digest = hashlib.sha256(canonical(facts)).hexdigest()[:8]
        return f"{recipe.name.replace('/', '-')}-{digest}"


@dataclass(frozen=True, slots=True)
class Contender:
    """One method: a recipe for each learning rate of its grid, of which validation chooses one."""

    method: str
    name: str
    strategy: Strategy
    recipes: tuple[Recipe, ...]


def make_plan(
    place: Path,
    overrides: Sequence[str],
    methods: str,
    *,
    seeds: int,
    quick: bool,
    minutes: float | None,
) -> tuple[Recipe, Plan]:
    """Read what the command line says: the recipe to compare on, and the plan. Raises RecipeError.

    `methods` are names with commas between them; "" is the usual ones.
    """
    recipe, given = read_recipe(place, overrides)
    usual = QUICK if quick else USUAL
    wanted = [name.strip() for name in methods.split(",")] if methods else usual
    sets = "".join(f" --set {shlex.quote(override)}" for override in (*overrides, *given))
    train = f"wardrobe train {shlex.quote(str(place))}{sets}"
    minutes = QUICK_MINUTES if quick and minutes is None else minutes
    plan = Plan(check_methods(wanted), seeds, quick, minutes, train)
    return shortened(recipe) if quick else recipe, plan


def quick_prompts(recipe: Recipe) -> Recipe:
    """Return the recipe with the few-shot prompts that `--quick` measures."""
    return apply_overrides(recipe, ["fewshot.k=[0,4]", "fewshot.draws=1", "fewshot.items=20"])


def read_recipe(place: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Return the recipe with a validation side, and the override that gives it one where needed."""
    recipe = apply_overrides(load_recipe(place), overrides)
    data = recipe.data
    if data.validation or data.validation_path or (data.hub and data.hub.validation):
        return recipe, []
    given = [f"data.validation={VALIDATION}"]
    return apply_overrides(recipe, given), given


def check_methods(wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the methods to compare, in the plan's order. Raises RecipeError on an unknown one."""
    for name in wanted:
        if name not in (*METHODS, "all"):
            raise RecipeError(f"{name!r} is no method. Known: all, {', '.join(METHODS)}.")
    chosen = set(METHODS if "all" in wanted else wanted) | {"base"}
    if "extract" in chosen:
        chosen.add("full")
    if "replay" in chosen:
        chosen.add("lora")
    return tuple(method for method in METHODS if method in chosen)


def shortened(recipe: Recipe) -> Recipe:
    """Return the recipe as `--quick` runs it: fewer steps and items, never more."""
    data = recipe.data
    most = {
        "train.steps": (recipe.train.steps, 36),
        "data.validation_limit": (data.validation_limit, 30),
        "data.held_out_limit": (data.held_out_limit, 60),
    }
    return apply_overrides(
        recipe, [f"{key}={min(now or limit, limit)}" for key, (now, limit) in most.items()]
    )


def contenders(recipe: Recipe, methods: Collection[str], *, quick: bool) -> list[Contender]:
    """Return what is trained with a grid of its own, the most telling first."""
    grid = QUICK_GRID if quick else GRID
    return [
        Contender(
            method=kind,
            name=NAMES[kind],
            strategy=_strategy(kind),
            recipes=tuple(at_rate(recipe, kind, factor) for factor in grid),
        )
        for kind in TRAINED
        if kind in methods
    ]


def at_rate(recipe: Recipe, kind: str, factor: float) -> Recipe:
    """Return the recipe with another method at `factor` times that method's usual rate."""
    usual = recipe.train.learning_rate / RATE.get(recipe.method.kind, 1.0)
    rate = min(1.0, usual * RATE.get(kind, 1.0) * factor)
    return apply_overrides(recipe, [f"method.kind={kind}", f"train.learning_rate={rate:.6g}"])


def at_rank(recipe: Recipe, rank: int) -> Recipe:
    """Return the recipe with another rank and the same scale."""
    alpha = max(1, round(recipe.method.alpha / recipe.method.r * rank))
    return apply_overrides(recipe, [f"method.r={rank}", f"method.alpha={alpha}"])


def _strategy(kind: str) -> Strategy:
    if kind in ("lora", "full"):
        return "LoRA" if kind == "lora" else "full"
    return "PEFT variant"


def seeds_of(recipe: Recipe, count: int) -> list[int]:
    """Return the training seeds; the split and the drawing of the data keep the recipe's own."""
    return [(recipe.seed + number) % 2**32 for number in range(count)]


def count_cells(recipe: Recipe, plan: Plan) -> int:
    """Return how many runs the plan has, found again or not."""
    planned = contenders(recipe, plan.methods, quick=plan.quick)
    replays = int("replay" in plan.methods)
    rows = len(planned) + replays
    curves = 0
    if not plan.quick and "lora" in plan.methods:
        curves = len(PARTS) + len([rank for rank in RANKS if rank != recipe.method.r])
    grids = sum(len(contender.recipes) for contender in planned)
    extracted = int("extract" in plan.methods)
    return grids + replays + curves + (rows + extracted) * (plan.seeds - 1)
