"""The grouped LoRA operator against float64, row by row."""

import random

import pytest
import torch

from serving.engine.ops.lora import LONG_RUN, apply_lora, packing_key, plan_lora
from serving.engine.slots import Slot

INPUTS, OUTPUTS, ROWS = 96, (96, 32, 32), 12
WRONG = 0.5  # relative error that a wrong adapter makes at least; float32 makes 1e-6, bf16 4e-3


def weights_of(dtype: torch.dtype) -> dict[int, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-2] ** -0.5).to(dtype)

    return {
        b: (normal(ROWS, 3 * b, INPUTS), *(normal(ROWS, b, out) for out in OUTPUTS))
        for b in (8, 16, 64)
    }


def batches() -> list[list[tuple[Slot | None, int]]]:
    """Batches in packing order: one token each, chunks, both, holes between slots."""
    rng = random.Random(2)
    slots = [None, *(Slot(b, row) for b in (8, 16, 64) for row in range(ROWS))]
    found: list[list[tuple[Slot | None, int]]] = [
        [(None, 5)],
        [(Slot(8, 3), 1)],
        [(Slot(8, row), 1) for row in range(ROWS)],
        [(Slot(8, 0), 1), (Slot(8, 11), 1)],
        [(None, 2), (Slot(16, 1), 3), (Slot(16, 2), 1), (Slot(64, 5), 2)],
        [(Slot(16, 1), LONG_RUN), (Slot(16, 2), LONG_RUN + 1)],
    ]
    for _ in range(60):
        some = [rng.choice(slots) for _ in range(rng.randint(1, 20))]
        counts = {slot: some.count(slot) for slot in some}
        singles = sorted(counts.items(), key=lambda item: packing_key(*item))
        longer = {rng.choice(slots): rng.randint(2, 30) for _ in range(rng.randint(0, 4))}
        found.append([*singles, *sorted(longer.items(), key=lambda item: packing_key(*item))])
    return found


def error_of(worn: list[tuple[Slot | None, int]], dtype: torch.dtype, shift: int = 0) -> float:
    """Return the largest relative error of a row against float64; `shift` wears a neighbour."""
    weights = weights_of(dtype)
    total = sum(rows for _, rows in worn)
    generator = torch.Generator().manual_seed(total)
    x = torch.randn(total, INPUTS, generator=generator).to(dtype)
    y = torch.zeros(total, sum(OUTPUTS), dtype=dtype)
    plan = plan_lora(worn, torch.device("cpu"))
    if plan is not None:
        apply_lora(y, x, weights, plan)
    slots = [slot for slot, rows in worn for _ in range(rows)]
    worst = 0.0
    for row, slot in enumerate(slots):
        if slot is None:
            assert not y[row].any(), "a row without an adapter was touched"
            continue
        other = (slot.row + shift) % ROWS
        a, *bs = (half[other].double() for half in weights[slot.bucket])
        shrunk = (x[row].double() @ a.t()).split(slot.bucket)
        truth = torch.cat([narrow @ b for narrow, b in zip(shrunk, bs, strict=True)])
        worst = max(worst, float((y[row].double() - truth).norm() / truth.norm()))
    return worst


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_every_row_gets_its_own_adapter_in_every_kind_of_batch(
    dtype: torch.dtype, bound: float
) -> None:
    for worn in batches():
        assert error_of(worn, dtype) < bound, worn


def test_a_wrong_adapter_exceeds_the_bound() -> None:
    for worn in batches()[1:6]:
        assert error_of(worn, torch.bfloat16, shift=1) > WRONG


def test_what_was_there_is_kept_and_added_to() -> None:
    weights = weights_of(torch.float32)
    worn = [(None, 2), (Slot(8, 1), 1), (Slot(8, 4), 3), (Slot(16, 2), 20)]
    x, y = torch.randn(26, INPUTS), torch.randn(26, sum(OUTPUTS))
    added, before = torch.zeros_like(y), y.clone()
    plan = plan_lora(worn, torch.device("cpu"))
    assert plan is not None
    apply_lora(added, x, weights, plan)
    apply_lora(y, x, weights, plan)
    torch.testing.assert_close(y, before + added)
