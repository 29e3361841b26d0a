"""y += B(A(x)) with another adapter for each row: the torch body and the plan it follows.

Rows that wear the same adapter are neighbours. Short runs of neighbours are padded to one length
and multiplied as one batch; a long run, or one alone, is plain products. Rows without an adapter
are in neither, so they cost nothing. The linears fused in one group read the same input, so they
share one A [slots, parts · rank, in]; each has its own B [slots, rank, out], with the scale in it.
One block-diagonal B for all of them would save products and cost twice the bytes: slower with many
adapters, no faster with one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from serving.engine.slots import Slot

Worn = Sequence[tuple[Slot | None, int]]  # slot and number of rows, in packing order
Weights = Mapping[int, tuple[torch.Tensor, ...]]  # rank bucket → A, B's of one layer's group
LONG_RUN = 8  # rows above which plain products beat a place in the padded batch


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows that wear the same adapter."""

    start: int
    stop: int
    slot: Slot

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Group:
    """Short runs of one rank bucket, computed as `count` products of `width` rows each."""

    start: int
    stop: int  # rows start..stop of the batch, all of them in the group
    bucket: int
    slots: slice | torch.Tensor  # rows of A and B, one for each product
    count: int
    width: int
    padded: torch.Tensor | None  # [count · width] rows of the group; None: they fit as they are
    compact: torch.Tensor | None  # [stop - start] where each row of the group went


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Which rows wear what in one step; the same for every layer."""

    runs: tuple[Run, ...]  # long ones and lonely ones
    groups: tuple[Group, ...]


def apply_lora(y: torch.Tensor, x: torch.Tensor, weights: Weights, plan: LoraPlan) -> None:
    """Add every row's own B(A(x)) to y in place. x [tokens, in], y [tokens, out]."""
    for run in plan.runs:
        a, *bs = (half[run.slot.row] for half in weights[run.slot.bucket])
        shrunk = torch.mm(x[run.start : run.stop], a.t())
        for part, narrow, b in _parts(y[run.start : run.stop], shrunk, bs):
            part.addmm_(narrow, b)
    for group in plan.groups:
        _apply_group(y[group.start : group.stop], x[group.start : group.stop], weights, group)


def _apply_group(y: torch.Tensor, x: torch.Tensor, weights: Weights, group: Group) -> None:
    a, *bs = (half[group.slots] for half in weights[group.bucket])
    rows = x if group.padded is None else x[group.padded]
    shrunk = torch.bmm(rows.view(group.count, group.width, -1), a.transpose(1, 2))
    if group.compact is None:
        for part, narrow, b in _parts(y.view(group.count, group.width, -1), shrunk, bs):
            part.baddbmm_(narrow, b)
    else:
        for part, narrow, b in _parts(y, shrunk, bs):
            part += torch.bmm(narrow, b).flatten(0, 1)[group.compact]


def _parts(
    y: torch.Tensor, shrunk: torch.Tensor, bs: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return, for each linear of the group, its columns of y and of A(x), and its B."""
    if len(bs) == 1:
        return ((y, shrunk, bs[0]),)
    outs, rank = [b.shape[-1] for b in bs], bs[0].shape[-2]
    return zip(y.split(outs, -1), shrunk.split(rank, -1), bs, strict=True)


def plan_lora(worn: Worn, device: torch.device) -> LoraPlan | None:
    """Plan a batch given as (slot, rows) in packing order; None when no row wears anything."""
    runs = merge_runs(worn)
    if not runs:
        return None
    groups: list[list[Run]] = []
    for run in runs:
        if run.length > LONG_RUN:
            continue
        last = groups[-1][-1] if groups else None
        if last and last.stop == run.start and last.slot.bucket == run.slot.bucket:
            groups[-1].append(run)
        else:
            groups.append([run])
    alone = [group[0] for group in groups if len(group) == 1]
    return LoraPlan(
        (*alone, *(run for run in runs if run.length > LONG_RUN)),
        tuple(_group(group, device) for group in groups if len(group) > 1),
    )


def packing_key(slot: Slot | None, rows: int) -> tuple[int, ...]:
    """Sort key that makes the short runs of a bucket neighbours; `rows` of this slot in all."""
    return (0,) if slot is None else (1, slot.bucket, rows > LONG_RUN, slot.row)


def merge_runs(worn: Worn) -> list[Run]:
    """Return who wears what, without the rows that wear nothing."""
    runs: list[Run] = []
    start = 0
    for slot, rows in worn:
        stop = start + rows
        if slot is not None:
            if runs and runs[-1].slot == slot and runs[-1].stop == start:
                runs[-1] = Run(runs[-1].start, stop, slot)
            else:
                runs.append(Run(start, stop, slot))
        start = stop
    return runs


def _group(runs: Sequence[Run], device: torch.device) -> Group:
    """Lay the runs out by slot: a view of neighbouring slots when most of them are used."""
    rows = [run.slot.row for run in runs]
    low, high = min(rows), max(rows) + 1
    dense = high - low <= 2 * len(set(rows)) and len(set(rows)) == len(rows)
    place = [row - low for row in rows] if dense else list(range(len(runs)))
    count = high - low if dense else len(runs)
    width = max(run.length for run in runs)
    start, stop = runs[0].start, runs[-1].stop
    padded, compact = [0] * (count * width), [0] * (stop - start)
    for run, position in zip(runs, place, strict=True):
        for offset in range(run.length):
            padded[position * width + offset] = run.start - start + offset
            compact[run.start - start + offset] = position * width + offset
    plain = len(padded) == len(compact) and padded == sorted(padded)
    return Group(
        start=start,
        stop=stop,
        bucket=runs[0].slot.bucket,
        slots=slice(low, high) if dense else torch.tensor(rows, device=device),
        count=count,
        width=width,
        padded=None if plain else torch.tensor(padded, device=device),
        compact=None if plain else torch.tensor(compact, device=device),
    )
