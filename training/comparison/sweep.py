"""A sweep: trials of one recipe with other keys, of which the validation side chooses the best.

Each trial is a run, found again by its facts, and what chooses the trials is seeded; so the same
command goes on where it was interrupted, and the held-out side is asked for the best one only.
"""

from dataclasses import asdict, dataclass

from training.card import read_card, write_card
from training.comparison.bench import Bench, Cell
from training.comparison.significance import groups_of, interval
from training.comparison.space import Chooser, Search, Space, Trial
from training.errors import RunFailed
from training.evaluation.statistics import Interval
from training.recipe import apply_overrides


@dataclass(frozen=True, slots=True)
class Tried:
    """One trial and its metric on the validation side."""

    trial: Trial
    cell: Cell
    share: Interval


@dataclass(frozen=True, slots=True)
class Sweep:
    """A finished sweep, the trials in the order they were tried."""

    tried: tuple[Tried, ...]
    best: Tried


def sweep(bench: Bench, space: Space, search: Search, choose: Chooser, total: int) -> Sweep:
    """Run what is left of a sweep and choose; the first of equals wins.

    Each trial's card gets the sweep into its lineage. Raises RunFailed when no trial was run, and
    what training and the engine raise; the same call goes on from there.
    """
    bench.expect(total)
    tried: list[Tried] = []
    while (trial := choose.ask()) is not None:
        found = _run(bench, trial)
        choose.tell(trial, found and found.share.value)
        if found:
            tried.append(found)
    if not tried:
        raise RunFailed("No trial was run: the minutes allow none. Raise --minutes.")
    best = max(tried, key=lambda one: one.share.value)
    for number, one in enumerate(tried):
        _note(one, number, space, search, len(tried), one is best)
    return Sweep(tuple(tried), best)


def _run(bench: Bench, trial: Trial) -> Tried | None:
    recipe = apply_overrides(bench.recipe, trial)
    name = ", ".join(trial)
    bench.remember_replay(recipe)
    cell = bench.train(name, recipe)
    if cell is None:
        return None
    items = bench.data.validation
    (judged,) = bench.judge([bench.variant(cell, name)], items)
    return Tried(trial, cell, interval([judged.run(recipe.seed)], groups_of(items)))


def _note(one: Tried, number: int, space: Space, search: Search, trials: int, chosen: bool) -> None:
    """Write into a trial's card which sweep it belongs to."""
    card = read_card(one.cell.adapter)
    card["lineage"]["sweep"] = {
        "search": search,
        "space": {key: asdict(tried) for key, tried in space.items()},
        "trial": number,
        "trials": trials,
        "set": list(one.trial),
        "validation": round(one.share.value, 4),
        "chosen": chosen,
    }
    write_card(one.cell.adapter, card)
