"""A step as numbers on the device: what is where, what is dead, what does not fit in."""

import random

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from serving.engine.batch import Batch, Chunk
from serving.engine.device_step import StepShape
from serving.engine.ops.triton.lora import DECODE_HEIGHT, PROMPT_HEIGHT
from serving.engine.slots import Slot
from serving.engine.step_graphs import CHUNKS, LONGEST, decode_shapes, prompt_shapes

HIGH = Slot(64, 3)
MIXED = Batch(  # one token of slot 5, three of slot 2 from 7 on, two of slot 0
    ids=torch.tensor([10, 20, 21, 22, 30, 31]),
    positions=torch.tensor([4, 7, 8, 9, 0, 1]),
    slots=torch.tensor([5, 2, 2, 2, 0, 0]),
    singles=1,
    chunks=(Chunk(1, 4, 2, 7), Chunk(4, 6, 0, 0)),
    sampled=torch.tensor([0, 5]),
    worn=((None, 1), (HIGH, 3), (None, 2)),
)


def seen(shape: StepShape, batch: Batch | None) -> dict[str, list[list[int]] | list[int]]:
    numbers = shape.numbers(batch)
    assert numbers is not None
    step = shape.view(torch.tensor(numbers, dtype=torch.int32))
    assert step.worn is not None
    names = ("chunks", "singles", "sampled", "ids", "positions", "slots")
    return {"worn": step.worn.table.tolist()} | {n: getattr(step, n).tolist() for n in names}


def test_a_batch_fills_its_own_shape() -> None:
    assert seen(StepShape.of(MIXED), MIXED) == {
        "worn": [[0, 1, 0, 0], [1, 3, 64, 3], [4, 2, 0, 0]],
        "chunks": [[1, 3, 2, 7], [4, 2, 0, 0]],
        "singles": [5],
        "sampled": [0, 5],
        "ids": [10, 20, 21, 22, 30, 31],
        "positions": [4, 7, 8, 9, 0, 1],
        "slots": [5, 2, 2, 2, 0, 0],
    }


def test_room_that_is_left_is_dead_and_behind_the_batch() -> None:
    """Dead rows are one more tile that wears nothing and reads nothing; dead tiles have none."""
    dead = [0, 0, 0, 0]
    assert seen(StepShape(worn=5, chunks=4, singles=3, sampled=3, rows=8), MIXED) == {
        "worn": [[0, 1, 0, 0], [1, 3, 64, 3], [4, 2, 0, 0], [6, 2, 0, 0], dead],
        "chunks": [[1, 3, 2, 7], [4, 2, 0, 0], [6, 2, -1, 0], dead],
        "singles": [5, -1, -1],
        "sampled": [0, 5, 0],
        "ids": [10, 20, 21, 22, 30, 31, 0, 0],
        "positions": [4, 7, 8, 9, 0, 1, 0, 0],
        "slots": [5, 2, 2, 2, 0, 0, -1, -1],
    }


def test_without_a_batch_all_is_dead() -> None:
    found = seen(StepShape(worn=1, chunks=1, singles=2, sampled=1, rows=2), None)
    assert found["worn"] == found["chunks"] == [[0, 0, 0, 0]]
    assert found["singles"] == found["slots"] == [-1, -1]


@pytest.mark.parametrize("part", ["worn", "chunks", "singles", "sampled", "rows"])
def test_a_batch_larger_than_any_room_does_not_fit(part: str) -> None:
    own = StepShape.of(MIXED)
    rooms = {name: getattr(own, name) for name in own.__slots__}
    assert StepShape(**rooms).numbers(MIXED) is not None
    assert StepShape(**(rooms | {part: rooms[part] - 1})).numbers(MIXED) is None


def test_every_part_begins_at_a_multiple_of_sixteen_bytes() -> None:
    """Kernels are compiled for that, and would be compiled again for anything else."""
    shape = StepShape(worn=4, chunks=3, singles=3, sampled=5, rows=13)
    numbers = shape.numbers(MIXED)
    assert numbers is not None
    table = torch.tensor(numbers, dtype=torch.int32)
    step = shape.view(table)
    assert step.worn is not None
    parts = (step.worn.table, step.chunks, step.singles, step.sampled, step.positions, step.slots)
    assert [4 * part.storage_offset() % 16 for part in parts] == [0] * 6


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (5, [1, 2, 4, 5]),
        (8, [1, 2, 4, 8]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
    ],
)
def test_sizes_of_captured_steps_waste_few_rows(most: int, sizes: list[int]) -> None:
    assert [shape.rows for shape in decode_shapes(most)] == sizes


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (9, [9]),
        (64, [16, 32, 64]),
        (200, [16, 32, 64, 128, 192, 200]),
        (5000, [16, 32, *range(64, 512, 64), 512, 640, 768, 896, LONGEST]),
    ],
)
def test_sizes_of_captured_prompts_end_where_the_device_is_slower(
    most: int, sizes: list[int]
) -> None:
    assert [shape.rows for shape in prompt_shapes(4, most)] == sizes


def drawn(random: random.Random, rows: int, running: int) -> Batch:
    """Return a step as the scheduler may plan one, with as many tiles as it can have."""
    prompts = random.randint(1, min(CHUNKS, running, rows // 2))
    singles = random.randint(0, min(running - prompts, rows - 2 * prompts))
    cuts = sorted(random.sample(range(1, (rows - singles) // 2), prompts - 1))
    counts = [2 * (b - a) for a, b in zip([0, *cuts], [*cuts, (rows - singles) // 2], strict=True)]
    starts = [singles + sum(counts[:i]) for i in range(prompts)]
    chunks = tuple(
        Chunk(a, a + n, i, 0) for i, (a, n) in enumerate(zip(starts, counts, strict=True))
    )
    filled = singles + sum(counts)
    worn = tuple((Slot(8, i), count) for i, count in enumerate([1] * singles + counts))
    zeros = torch.zeros(filled, dtype=torch.int64)
    sampled = torch.arange(singles + prompts)
    return Batch(zeros, zeros, zeros, singles, chunks, sampled, worn)


@pytest.mark.parametrize("running", [1, 4, 32, 128])
def test_every_step_of_few_prompts_fits_whoever_wears_what(running: int) -> None:
    """All sequences wear different adapters: more tiles there cannot be."""
    draw = random.Random(running)
    for shape in prompt_shapes(running, 512):
        for _ in range(30):
            batch = drawn(draw, draw.randint(2, shape.rows), running)
            assert shape.numbers(batch) is not None, (shape, batch)


def test_single_tokens_have_low_tiles_however_many_they_are() -> None:
    """They may all wear different adapters, and a tile is computed whole for one row of it."""
    numbers = torch.zeros(10_000, dtype=torch.int32)
    for shapes, heights in (
        (decode_shapes(128), {DECODE_HEIGHT}),
        (prompt_shapes(32, 512)[:3], {DECODE_HEIGHT}),
        (prompt_shapes(32, 512)[3:], {PROMPT_HEIGHT}),
    ):
        steps = [shape.view(numbers[: len(shape.numbers(None) or ())]) for shape in shapes]
        assert {step.worn.height for step in steps if step.worn} == heights


@pytest.mark.parametrize("most", [1, 5, 32, 128])
def test_every_step_of_single_tokens_fits(most: int) -> None:
    for shape in decode_shapes(most):
        for rows in range(1, shape.rows + 1):
            ids = torch.zeros(rows, dtype=torch.int64)
            worn = tuple((Slot(8, i), 1) for i in range(rows))
            batch = Batch(ids, ids, ids, rows, (), torch.arange(rows), worn)
            assert shape.numbers(batch) is not None


def test_more_prompts_than_there_is_room_for_do_not_fit() -> None:
    *_, shape = prompt_shapes(64, 2 * PROMPT_HEIGHT)
    count = shape.chunks + 1
    ids = torch.zeros(2 * count, dtype=torch.int64)
    chunks = tuple(Chunk(2 * i, 2 * i + 2, i, 0) for i in range(count))
    batch = Batch(ids, ids, ids, 0, chunks, torch.arange(count), ((None, 2 * count),))
    assert shape.numbers(batch) is None
