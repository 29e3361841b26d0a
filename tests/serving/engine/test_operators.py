"""The compiled operators against float64 and torch, on every set of instructions here."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from serving.engine.kv_cache import BLOCK
from serving.engine.linear import PANEL, SQUARED, CompiledLinear, Linear, PackedLinear, pack
from serving.engine.lora import pack_b
from serving.engine.ops.blocks import BlockCopy, Slots, copy_blocks
from serving.engine.ops.lora import LoraPlan, Run, apply_lora, plan_lora
from serving.engine.ops.native.library import Library
from serving.engine.ops.native.target import TARGETS, Target, runnable_targets
from serving.engine.ops.norm import rms_norm
from serving.engine.ops.rope import rope, rope_angles, rope_tables
from serving.engine.ops.sampling import greedy
from serving.engine.slots import Slot

TOLERANCE = {torch.float32: (1e-5, 2e-6), torch.bfloat16: (1.6e-2, 4e-3)}  # relative, absolute


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    torch.manual_seed(3)
    with torch.inference_mode():
        yield


def close(library: Library, actual: torch.Tensor, exact: torch.Tensor, scale: float = 1.0) -> None:
    """Compare with float64; `scale` is the size of the numbers that were added up."""
    relative, absolute = TOLERANCE[library.dtype]
    assert_close(actual.double(), exact, rtol=relative, atol=absolute * scale)


def in_panels(keys: torch.Tensor) -> torch.Tensor:
    """Return keys [slots, kv_heads, length, dim] as `KVCache` has them with `packed_keys`."""
    *many, length, dim = keys.shape
    step = 4 // keys.element_size()
    rows = keys.reshape(*many, length // BLOCK, BLOCK, dim // step, step)
    return rows.transpose(-3, -2).reshape(*many, length // BLOCK, dim * BLOCK)


def unpacked(keys: torch.Tensor, dim: int) -> torch.Tensor:
    """Return keys [slots, kv_heads, length, dim] as they were before they were packed."""
    step = 4 // keys.element_size()
    panels = keys.view(*keys.shape[:3], dim // step, BLOCK, step).transpose(3, 4)
    return panels.reshape(*keys.shape[:2], -1, dim)


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers as columns of a wider tensor: rows that are apart."""
    wide = torch.full((x.shape[0], x.shape[1] + 6), math.nan, dtype=x.dtype)
    wide[:, 2:-4] = x
    return wide[:, 2:-4]


@pytest.mark.parametrize("rows", [*range(1, 15), 24, 31, 33, 64, 200])
def test_a_linear_equals_float64(library: Library, rows: int) -> None:
    for inputs, outputs in ((2, 1), (34, 33), (64, 32), (130, 97), (576, 130), (34, 700)):
        x = torch.randn(rows, inputs, dtype=library.dtype)
        w = torch.randn(outputs, inputs).to(library.dtype)
        bias = torch.randn(outputs).to(library.dtype)
        exact = x.double() @ w.double().T
        scale = math.sqrt(inputs)
        packed = pack(w)
        close(library, library.linear(x, packed, None, outputs), exact, scale)
        biased = library.linear(strided(x), packed, bias, outputs)
        close(library, biased, exact + bias.double(), scale)
        y = torch.randn(rows, outputs).to(library.dtype)
        before = y.double()
        library.linear(x, packed, None, outputs, out=y)
        close(library, y, before + exact, scale)


def test_a_row_of_a_linear_is_the_same_to_the_last_bit_in_every_batch(library: Library) -> None:
    x, w = torch.randn(130, 98).to(library.dtype), pack(torch.randn(700, 98).to(library.dtype))
    whole = library.linear(x, w, None, 700)
    for rows in (1, 5, 12, 13, 97):
        assert torch.equal(library.linear(x[:rows], w, None, 700), whole[:rows])


def test_a_packed_weight_is_read_back_as_it_was(library: Library) -> None:
    for outputs, inputs in ((1, 2), (31, 6), (33, 64), (258, 64)):
        weight = torch.randn(outputs, inputs).to(library.dtype)
        assert torch.equal(PackedLinear(weight, None).dense(), weight)


def test_some_outputs_of_a_linear_and_the_squares_of_its_rows_equal_float64(
    library: Library,
) -> None:
    """Columns begin and end inside panels, and the bias is in neither."""
    x, w = torch.randn(5, 130).to(library.dtype), torch.randn(97, 130).to(library.dtype)
    exact = x.double() @ w.double().T
    for linear in (CompiledLinear(library, w, w[:, 0]), Linear(w, w[:, 0])):
        for columns in (slice(0, 97), slice(0, 3), slice(31, 33), slice(32, 64), slice(90, 97)):
            found = linear.product(x, columns)
            close(library, found, exact[:, columns], math.sqrt(130))
        assert_close(linear.squares.double(), w.double().square().sum(1), rtol=1e-5, atol=0)


class Widened(TorchDispatchMode):
    """Notes the bytes of the largest float32 tensor that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.most = max(self.most, made.nbytes)
        return made


@pytest.mark.parametrize("kind", [PackedLinear, Linear])
def test_the_squares_of_a_large_weight_are_computed_in_pieces(
    kind: type[PackedLinear] | type[Linear],
) -> None:
    w = torch.randn(3001, 4096).to(torch.bfloat16)
    linear = kind(w, None)
    with Widened() as widened:
        squares = linear.squares
    assert 0 < widened.most <= 4 * SQUARED
    assert_close(squares.double(), w.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 15, 16, 33, 64, 576])
def test_rms_norm_equals_float64(library: Library, size: int) -> None:
    x, w = torch.randn(7, size).to(library.dtype), torch.randn(size).to(library.dtype)
    exact = rms_norm(x.double(), w.double(), 1e-5)
    close(library, library.rms_norm(x, w, 1e-5), exact)
    close(library, library.rms_norm(strided(x), w, 1e-5), exact)


@pytest.mark.parametrize("size", [1, 15, 16, 33, 1536])
def test_silu_mul_equals_float64_from_the_smallest_to_the_largest_gate(
    library: Library, size: int
) -> None:
    gate = torch.linspace(-120, 120, 9 * size).view(9, size)
    x = torch.cat((gate, torch.randn(9, size)), dim=1).to(library.dtype)
    wide = x.double()
    exact = torch.nn.functional.silu(wide[:, :size]) * wide[:, size:]
    close(library, library.silu_mul(x), exact)
    close(library, library.silu_mul(strided(x)), exact)


@pytest.mark.parametrize("size", [1, 15, 16, 258, 49152])
def test_greedy_takes_the_first_of_the_largest_and_sees_what_is_not_finite(
    library: Library, size: int
) -> None:
    scores = (torch.randn(20, size) * 4).round().to(library.dtype)  # many are equal
    scores[18, size // 2] = math.inf
    scores[19, size - 1] = math.nan
    wanted, finite = greedy(scores)
    for given in (scores, strided(scores)):
        tokens, whole = library.greedy(given)
        assert torch.equal(tokens[:19], wanted[:19])
        assert torch.equal(whole, finite)
    assert whole.tolist() == [True] * 18 + [False] * 2


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 16), (6, 2, 64), (2, 2, 6)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_rotates_queries_in_place_and_stores_keys_and_values(
    library: Library, heads: int, kv_heads: int, dim: int, normed: bool
) -> None:
    rows, length = 9, 3 * BLOCK
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(library.dtype)
    norms = (torch.rand(dim).to(library.dtype), torch.rand(dim).to(library.dtype))
    frequencies = torch.tensor([100.0 ** (-i / dim) for i in range(0, dim, 2)])
    slots = torch.tensor([2, 2, 2, 0, 1, 1, 4, 4, 4])
    positions = torch.tensor([3, 4, 5, length - 1, 0, 1, 15, 16, 17])
    wide = qkv.double()
    qk, v = wide.split((heads + kv_heads, kv_heads), dim=1)
    if normed:
        q = rms_norm(qk[:, :heads], norms[0].double(), 1e-6)
        qk = torch.cat((q, rms_norm(qk[:, heads:], norms[1].double(), 1e-6)), dim=1)
    cos, sin = rope_tables(frequencies, length, torch.float64)
    exact = rope(qk, cos[positions], sin[positions])
    values = torch.full((5, kv_heads, length, dim), 7.0).to(library.dtype)
    packed_keys = in_panels(values)
    library.rotate_and_store(
        *(qkv, *rope_angles(frequencies, length), slots, positions, packed_keys, values),
        norms if normed else None,
        1e-6,
    )
    keys = unpacked(packed_keys, dim)
    close(library, qkv[:, :heads], exact[:, :heads])
    close(library, keys[slots, :, positions], exact[:, heads:])
    assert torch.equal(values[slots, :, positions].double(), v)
    assert int((keys != 7.0).any(-1).sum()) == int((values != 7.0).any(-1).sum()) == rows * kv_heads


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (7, 1, 32), (16, 2, 8), (3, 3, 20), (5, 1, 144)],
)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_attention_equals_float64_for_sequences_of_every_length(
    library: Library, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """Nothing beyond a row's own keys is read: it is NaN there."""
    positions = torch.tensor([0, 1, 15, 16, 63, 64, 130, 511, 512, 700, 1099])
    slots = torch.randperm(len(positions))
    length = 69 * BLOCK
    q = torch.randn(len(positions), heads, dim).to(library.dtype)
    keys = torch.randn(11, kv_heads, length, dim).to(library.dtype)
    values = torch.randn(11, kv_heads, length, dim).to(library.dtype)
    free = torch.ones(11, length, dtype=torch.bool)
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        free[slot, : position + 1] = False
    for half in (keys, values):
        half.transpose(1, 2)[free] = math.nan
    out = library.attention(q, in_panels(keys), values, slots, positions, window)
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        seen = slice(max(0, position + 1 - (window or length)), position + 1)
        k, v = keys[slot, :, seen].double(), values[slot, :, seen].double()
        own = q[row].double().view(kv_heads, heads // kv_heads, dim)
        weights = torch.softmax(own @ k.transpose(1, 2) / math.sqrt(dim), dim=-1)
        close(library, out[row], (weights @ v).view(heads, dim))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (7, 1, 32), (3, 3, 20), (30, 1, 8)]
)
@pytest.mark.parametrize("window", [None, 1, 70, 600])
def test_attention_of_a_prompt_is_that_of_its_tokens_one_by_one(
    library: Library, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    """To the last bit, beside single tokens and another prompt, over splits and stretches."""
    length = 36 * BLOCK
    prompts = [(0, 20, 83), (1, 490, 540), (3, 63, 64), (2, 511, 513)]  # slot, positions
    places = [(slot, i) for slot, first, last in prompts for i in range(first, last)]
    slots, positions = (torch.tensor(column) for column in zip(*places, strict=True))
    q = torch.randn(len(places), heads, dim).to(library.dtype)
    keys = in_panels(torch.randn(4, kv_heads, length, dim).to(library.dtype))
    values = torch.randn(4, kv_heads, length, dim).to(library.dtype)
    together = library.attention(q, keys, values, slots, positions, window)
    for row in range(len(places)):
        one = slice(row, row + 1)
        alone = library.attention(q[one], keys, values, slots[one], positions[one], window)
        assert torch.equal(together[one], alone)


def any_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return finite numbers of all sizes, among them those that are less than normal."""
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    limits = torch.iinfo(bits)
    numbers = torch.randint(limits.min, limits.max, shape, dtype=bits).view(dtype)
    return torch.where(numbers.isfinite(), numbers, torch.zeros((), dtype=dtype))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def blocks_case(dtype: torch.dtype, dim: int) -> tuple[torch.Tensor, Slots]:
    keys, values = (any_numbers((3, 4, 2, 5, BLOCK * dim), dtype) for _ in range(2))
    return any_numbers((7, 2, 3, 2, BLOCK * dim), dtype), (keys, values)


@pytest.mark.parametrize("dim", [1, 2, 5, 64])
@pytest.mark.parametrize("back", [False, True])
def test_blocks_are_copied_to_the_bit_and_nothing_beside_them(
    library: Library, dim: int, back: bool
) -> None:
    kept, slots = blocks_case(library.dtype, dim)
    wanted, (keys, values) = kept.clone(), (slots[0].clone(), slots[1].clone())
    for blocks, slot, first in (([4, 5, 1], 2, 1), ([0], 0, 4), ([], 1, 0)):
        copy = BlockCopy(blocks, slot, first, back)
        copy_blocks(wanted, (keys, values), copy)
        assert library.copy_blocks(kept, slots, copy)
    assert same_bits(kept, wanted)
    assert same_bits(slots[0], keys)
    assert same_bits(slots[1], values)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("half", [0, 1])
def test_a_copied_number_that_is_not_finite_is_seen_and_no_other(
    library: Library, poison: float, place: int, half: int
) -> None:
    kept, slots = blocks_case(library.dtype, dim=5)
    for whole in (kept, *slots):
        whole.mul_(0)  # else the sum that torch looks at could overflow
    slots[half][place, 2, place, 1 + place, place] = poison  # in the first block or the last one
    first = 1 + place
    for copy in (library.copy_blocks, copy_blocks):
        assert not copy(kept, slots, BlockCopy([3], 2, first))
        assert not copy(kept, slots, BlockCopy([6, 2], 2, first))
        assert copy(kept, slots, BlockCopy([1, 2, 3], 2, first + 1))
        assert copy(kept, slots, BlockCopy([1], 1, first))


def lora_case(
    rank: int, dtype: torch.dtype, rows: int, inputs: int, outputs: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    x = torch.randn(rows, inputs).to(dtype)
    y = torch.randn(rows, sum(outputs)).to(dtype)
    a = (torch.randn(2, 5, len(outputs) * rank, inputs) * inputs**-0.5).to(dtype)
    bs = ((torch.randn(2, 5, rank, out) * rank**-0.5).to(dtype) for out in outputs)
    return x, y, (a, *bs)


def packed(halves: tuple[torch.Tensor, ...], outputs: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """A as it is, and every B as the compiled operators read it."""
    a, *bs = halves
    offsets = [sum(outputs[:part]) % PANEL for part in range(len(outputs))]
    return (a, *(pack_b(b.mT, offset) for b, offset in zip(bs, offsets, strict=True)))


def lora_exact(
    y: torch.Tensor, x: torch.Tensor, halves: tuple[torch.Tensor, ...], runs: list[Run]
) -> torch.Tensor:
    exact = y.double()
    for run in runs:
        a, *bs = (half[1, run.slot.row].double() for half in halves)
        shrunk = (x[run.start : run.stop].double() @ a.T).split(run.slot.bucket, dim=1)
        parts = [narrow @ b for narrow, b in zip(shrunk, bs, strict=True)]
        exact[run.start : run.stop] += torch.cat(parts, dim=1)
    return exact


@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("outputs", [(33,), (64, 256), (272, 34, 34)])
def test_lora_equals_float64_for_every_rank_bucket(
    library: Library, rank: int, outputs: tuple[int, ...]
) -> None:
    x, y, halves = lora_case(rank, library.dtype, 130, 66, outputs)
    # One row, few, none, the same slot twice, more than one task takes; the rest is the base.
    spans = [(0, 1, 3), (1, 2, 1), (2, 7, 0), (9, 9, 2), (10, 14, 3), (30, 128, 4)]
    runs = [Run(start, stop, Slot(rank, row)) for start, stop, row in spans]
    exact = lora_exact(y, x, halves, runs)
    for given in (x, strided(x)):
        own = strided(y.clone())
        library.lora(own, given, {rank: packed(halves, outputs)}, outputs, 1, runs)
        close(library, own, exact, 2.0)
        assert torch.equal(own[7:10], y[7:10])
        assert torch.equal(own[128:], y[128:])


def test_lora_mixes_rank_buckets_in_one_call(library: Library) -> None:
    outputs = (48, 16)
    x, y, narrow = lora_case(8, library.dtype, 20, 64, outputs)
    wide = lora_case(64, library.dtype, 20, 64, outputs)[2]
    runs = [Run(0, 3, Slot(64, 2)), Run(3, 4, Slot(8, 4)), Run(6, 20, Slot(64, 0))]
    exact = lora_exact(lora_exact(y, x, wide, runs[::2]), x, narrow, runs[1:2])
    stacks = {64: packed(wide, outputs), 8: packed(narrow, outputs)}
    library.lora(y, x, stacks, outputs, 1, runs)
    close(library, y, exact, 2.0)


@pytest.mark.parametrize("size", [1.0, 2.0**-62], ids=["normal", "sums below normal floats"])
def test_a_row_of_lora_is_the_same_to_the_last_bit_beside_any_others(
    library: Library, size: float
) -> None:
    """Ranks that share a register, fill one or need several, in runs of many rows and of one."""
    outputs, ranks = (592, 66, 34), (8, 16, 64, 8, 32, 16)
    stacks = {rank: lora_case(rank, library.dtype, 1, 100, outputs)[2] for rank in set(ranks)}
    stacks = {
        r: packed((a * size, *(b * size for b in bs)), outputs) for r, (a, *bs) in stacks.items()
    }
    x = torch.randn(150, 100).to(library.dtype)
    bounds = [0, 1, 2, 3, 9, 40, 41, 42, 75, 150]
    slots = [Slot(ranks[i % len(ranks)], i % 5) for i in range(len(bounds) - 1)]

    def added(first: int, last: int) -> torch.Tensor:
        own = [(max(a, first), min(b, last)) for a, b in pairwise(bounds)]
        runs = [
            Run(start - first, stop - first, slot)
            for (start, stop), slot in zip(own, slots, strict=True)
            if start < stop
        ]
        y = torch.zeros(last - first, sum(outputs)).to(library.dtype)
        library.lora(y, x[first:last], stacks, outputs, 1, runs)
        return y

    whole = added(0, len(x))
    assert (whole != 0).any()
    for first, last in (
        (0, 1),
        (0, 32),
        (0, 41),
        (1, 41),
        (2, 3),
        (8, 10),
        (39, 150),
        (74, 76),
        (100, 101),
    ):
        assert same_bits(added(first, last), whole[first:last])


def test_lora_of_a_wrong_slot_exceeds_the_bound(library: Library) -> None:
    x, y, halves = lora_case(16, library.dtype, 6, 64, (48,))
    exact = lora_exact(y, x, halves, [Run(0, 6, Slot(16, 1))])
    library.lora(y, x, {16: packed(halves, (48,))}, (48,), 1, [Run(0, 6, Slot(16, 2))])
    with pytest.raises(AssertionError):
        close(library, y, exact, 2.0)


def test_lora_in_torch_and_in_cpp_agree(library: Library) -> None:
    outputs = (96, 32, 32)
    x, y, halves = lora_case(16, library.dtype, 12, 96, outputs)
    worn = [(Slot(16, 0), 1), (Slot(16, 3), 2), (Slot(16, 1), 9)]
    plan = plan_lora(worn, torch.device("cpu"))
    assert isinstance(plan, LoraPlan)
    ours, theirs = y.clone(), y.clone()
    runs = [Run(0, 1, worn[0][0]), Run(1, 3, worn[1][0]), Run(3, 12, worn[2][0])]
    library.lora(ours, x, {16: packed(halves, outputs)}, outputs, 0, runs)
    apply_lora(theirs, x, {16: tuple(half[0] for half in halves)}, plan)
    close(library, ours, theirs.double(), 2.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [5, 30, 34, 39])
def test_a_row_that_is_not_finite_stays_alone(library: Library, poison: float, row: int) -> None:
    """In every operator the other rows are the same to the last bit."""
    rows = 40
    x = torch.randn(rows, 64).to(library.dtype)
    sick = x.clone()
    sick[row, 3] = poison
    others = [i for i in range(rows) if i != row]
    weight, gain = pack(torch.randn(40, 64).to(library.dtype)), torch.ones(64).to(library.dtype)
    wider = pack(torch.randn(40, 66).to(library.dtype))
    caches = []
    for heads, kv_heads, dim in ((4, 2, 16), (1, 1, 64)):
        values = torch.randn(rows, kv_heads, 208, dim).to(library.dtype)
        caches.append((heads, dim, in_panels(values), values))
    slots, positions = torch.arange(rows), torch.arange(rows) * 5
    ranks = (8, 16, 64)
    stacks = {r: packed(lora_case(r, library.dtype, 1, 64, (40,))[2], (40,)) for r in ranks}
    bounds = [2, 9, 12, 25, 33, 35, 36, 40]
    slots_worn = [Slot(ranks[i % 3], i % 5) for i in range(len(bounds) - 1)]
    runs = [Run(*span, slot) for span, slot in zip(pairwise(bounds), slots_worn, strict=True)]

    def outputs(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield library.linear(x, weight, None, 40)
        yield library.linear(torch.cat((x, x[:, :2]), dim=1), wider, None, 40)
        yield library.rms_norm(x, gain, 1e-5)
        yield library.silu_mul(x)
        yield library.greedy(x)[0]
        for heads, dim, keys, values in caches:
            yield library.attention(x.view(rows, heads, dim), keys, values, slots, positions)
        y = torch.zeros(rows, 40).to(library.dtype)
        library.lora(y, x, stacks, (40,), 0, runs)
        yield y

    for healthy, poisoned in zip(outputs(x), outputs(sick), strict=True):
        assert torch.equal(healthy[others], poisoned[others])
    assert not library.linear(sick, weight, None, 40)[row].isfinite().any()


def test_a_processor_gets_the_best_body_that_it_can_run() -> None:
    def best(known: Mapping[str, object]) -> str:
        return runnable_targets(torch.bfloat16, known)[0].name

    modern = dict.fromkeys(TARGETS[0].needs, True)
    assert runnable_targets(torch.bfloat16, modern) == list(TARGETS)
    assert runnable_targets(torch.float32, modern) == list(TARGETS[1:])
    assert best(modern | {"amx_bf16": False}) == "AVX-512 BF16"
    assert best(modern | {"amx_tile": False}) == "AVX-512 BF16"
    assert best(modern | {"avx512_bf16": False}) == "AVX2"
    assert best(modern | {"avx512_vl": False}) == "AVX2"
    assert best({"avx2": True}) == "generic"
    assert best({"architecture": "aarch64"}) == "generic"


def test_no_target_uses_an_instruction_that_it_does_not_ask_for(tmp_path: Path) -> None:
    """A flag that the processor was not asked about would be an illegal instruction somewhere."""
    asked = {"-mavx2": "avx2", "-mfma": "fma3"}
    asked |= {f"-mavx512{name}": f"avx512_{name}" for name in ("f", "bw", "vl", "dq", "bf16")}
    asked |= {f"-mamx-{name}": f"amx_{name}" for name in ("tile", "bf16")}
    for target in TARGETS:
        assert isinstance(target, Target)
        assert {asked[flag] for flag in target.flags} == target.needs
