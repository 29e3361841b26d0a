"""The Triton operators against float64 and torch: in the interpreter on a CPU, or on a GPU.

The interpreter multiplies the bits of bfloat16 as if they were whole numbers, so there it is
float32 and float16.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from serving.engine.batch import Chunk
from serving.engine.lora import HostAdapter, LoraLayout, LoraStacks
from serving.engine.ops.activation import silu_mul as torch_silu_mul
from serving.engine.ops.lora import Worn
from serving.engine.ops.norm import rms_norm as torch_rms_norm
from serving.engine.ops.rope import rope, rope_angles, rope_tables
from serving.engine.ops.triton import attention, lora
from serving.engine.ops.triton.activation import adapted_silu_mul, silu_mul
from serving.engine.ops.triton.norm import add_rms_norm, rms_norm
from serving.engine.ops.triton.rope import rotate_and_store
from serving.engine.slots import Slot
from serving.engine.spec import LinearGroup
from tests.serving.engine.kernels import (
    close,
    in_pages,
    in_two_formats,
    new_nan,
    numbers,
    of_pages,
    on_every_device,
    share_out_to_few,
)

pytestmark = [
    on_every_device,
    in_two_formats,
    # The interpreter takes the largest of numbers by numpy, which warns where all are NaN.
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    torch.manual_seed(3)
    # The interpreter computes with numpy, which warns of infinities that a GPU computes with.
    with torch.inference_mode(), np.errstate(all="ignore"):
        yield


def test_rms_norm_equals_float64_and_adds_what_it_is_given(
    device: torch.device, dtype: torch.dtype
) -> None:
    for size in (1, 33, 64):
        x, delta = torch.randn(2, 3, size, device=device).to(dtype)
        weight = torch.randn(size, device=device).to(dtype)
        close(rms_norm(x, weight, 1e-5), torch_rms_norm(x.double(), weight.double(), 1e-5))
        exact = x + delta
        normed = add_rms_norm(x, delta, None, weight, 1e-5)
        assert torch.equal(x, exact)
        close(normed, torch_rms_norm(exact.double(), weight.double(), 1e-5))
        lora, exact = torch.randn_like(x), exact.double() + delta.double()
        normed = add_rms_norm(x, delta, lora, weight, 1e-5)
        close(x, exact + lora.double(), 3.0)
        close(normed, torch_rms_norm(x.double(), weight.double(), 1e-5))


def test_silu_mul_equals_float64_from_the_smallest_to_the_largest_gate(
    device: torch.device, dtype: torch.dtype
) -> None:
    gate = torch.linspace(-120, 120, 3 * 1030, device=device).view(3, 1030)
    x = torch.cat((gate, torch.randn(3, 1030, device=device)), dim=1).to(dtype)
    close(silu_mul(x), torch_silu_mul(x.double()))
    lora = torch.randn_like(x)
    close(silu_mul(x, lora), torch_silu_mul(x.double() + lora.double()))


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head-norms"])
def test_rope_rotates_queries_in_place_and_stores_keys_and_values(
    device: torch.device, dtype: torch.dtype, normed: bool, adapted: bool
) -> None:
    heads, kv_heads, dim, length = 3, 1, 12, 40
    slots = torch.tensor([2, 2, 0, -1, 1], device=device)
    positions = torch.tensor([3, 4, 39, 7, 0], device=device)
    qkv = torch.randn(5, heads + 2 * kv_heads, dim, device=device).to(dtype)
    norms = (
        torch.rand(dim, device=device).to(dtype),
        torch.rand(dim, device=device).to(dtype),
    )
    frequencies = torch.tensor([100.0 ** (-i / dim) for i in range(0, dim, 2)], device=device)
    lora = torch.randn_like(qkv) if adapted else None
    whole = qkv.double() if lora is None else qkv.double() + lora.double()
    qk, v = whole.split((heads + kv_heads, kv_heads), dim=1)
    if normed:
        q = torch_rms_norm(qk[:, :heads], norms[0].double(), 1e-6)
        qk = torch.cat((q, torch_rms_norm(qk[:, heads:], norms[1].double(), 1e-6)), dim=1)
    cos, sin = rope_tables(frequencies, length, torch.float64)
    exact = rope(qk, cos[positions], sin[positions])
    keys = torch.full((5, kv_heads, length, dim), 7.0, device=device).to(dtype)
    pages = in_pages(keys, keys)
    nobodys = int(pages.keys.isnan().sum())
    rotate_and_store(
        *(qkv, *rope_angles(frequencies, length), slots.int(), positions.int(), pages, lora),
        norms if normed else None,
        1e-6,
    )
    keys, values = (of_pages(half, pages.table) for half in (pages.keys, pages.values))
    live = slots >= 0
    close(qkv[:, :heads], exact[:, :heads], 2.0)
    close(keys[slots[live], :, positions[live]], exact[live, heads:], 2.0)
    assert torch.equal(values[slots[live], :, positions[live]], v[live].to(dtype))
    for cache in (keys[:, :, :length], values[:, :, :length]):
        assert int((cache != 7.0).any(-1).sum()) == int(live.sum()) * kv_heads
    assert int(pages.keys.isnan().sum()) == int(pages.values.isnan().sum()) == nobodys


def reference(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int | None
) -> torch.Tensor:
    """Return [heads, dim] for one query [heads, dim] over one slot [kv_heads, length, dim]."""
    (heads, dim), kv_heads = q.shape, keys.shape[0]
    seen = slice(max(0, position + 1 - (window or keys.shape[1])), position + 1)
    k, v = keys[:, seen].double(), values[:, seen].double()
    own = q.double().view(kv_heads, heads // kv_heads, dim)
    weights = torch.softmax(own @ k.transpose(1, 2) / math.sqrt(dim), dim=-1)
    return (weights @ v).view(heads, dim)


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 16), (3, 3, 20)])
@pytest.mark.parametrize("programs", [1, 24], ids=["whole", "shared-out"])
def test_a_decoded_token_sees_its_own_keys_and_nothing_else(
    device: torch.device,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    dim: int,
    programs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing beyond a row's own keys is read: it is NaN there. A dead row is zero."""
    monkeypatch.setattr(attention, "PROGRAMS", programs)
    positions, slots, length = [0, 63, 64, 199, 5], [3, 0, 4, 1, -1], 200
    qkv = torch.randn(7, heads + 2 * kv_heads, dim, device=device).to(dtype)
    keys, values = torch.full((2, 5, kv_heads, length, dim), math.nan, device=device).to(dtype)
    for slot, position in zip(slots[:-1], positions[:-1], strict=True):
        for half in (keys, values):
            half[slot, :, : position + 1] = torch.randn(
                kv_heads, position + 1, dim, device=device
            ).to(dtype)
    out = torch.full((7, heads, dim), 9.0, device=device).to(dtype)
    attention.decode_attention(
        *(qkv, in_pages(keys, values), numbers(slots, device), numbers(positions, device)),
        *(window, out),
    )
    for row, (slot, position) in enumerate(zip(slots[:-1], positions[:-1], strict=True)):
        q = qkv[row, :heads]
        close(out[row], reference(q, keys[slot], values[slot], position, window))
    assert not out[4].any()
    assert (out[5:] == 9.0).all()


@pytest.mark.parametrize("window", [None, 40])
def test_a_chunk_of_a_prompt_sees_what_came_before_each_token(
    device: torch.device, dtype: torch.dtype, window: int | None
) -> None:
    heads, kv_heads, dim, length = 4, 2, 16, 120
    chunks = [Chunk(1, 4, 2, 0), Chunk(4, 74, 0, 30)]  # rows, slot, position of the first
    qkv = torch.randn(78, heads + 2 * kv_heads, dim, device=device).to(dtype)
    keys, values = torch.randn(2, 3, kv_heads, length, dim, device=device).to(dtype)
    for half in (keys, values):
        half[2, :, 3:] = half[0, :, 100:] = math.nan
    out = torch.full((78, heads, dim), 9.0, device=device).to(dtype)
    tiles = [*attention.cut_chunks([*chunks, Chunk(74, 77, -1, 0)]), *[0] * attention.TILE]
    tiles = numbers(tiles, device).view(-1, attention.TILE)
    attention.chunk_attention(qkv, in_pages(keys, values), tiles, window, out)
    for chunk in chunks:
        for row in range(chunk.start, chunk.stop):
            position = chunk.position + row - chunk.start
            own = keys[chunk.slot], values[chunk.slot]
            close(out[row], reference(qkv[row, :heads], *own, position, window))
    assert not out[74:77].any()
    assert (out[[0, 77]] == 9.0).all()


class Wardrobe:
    """Stacks of one group of linears, with an adapter in each of some slots."""

    def __init__(
        self,
        inputs: int,
        outputs: tuple[int, ...],
        slots: Sequence[Slot],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        names = tuple(f"part{i}" for i in range(len(outputs)))
        layout = LoraLayout(2, (LinearGroup("group", names, inputs, outputs),))
        self.dtype = dtype
        self.stacks = LoraStacks(layout, 96, dtype, device)
        self.arena = lora.Arena(self.stacks)
        self.worn: dict[Slot, tuple[torch.Tensor, ...]] = {}
        for slot in slots:
            self.load(slot)

    def load(self, slot: Slot) -> None:
        """Put another random adapter into a slot."""
        layout = self.stacks.layout
        weights = torch.empty(layout.size(slot.bucket), dtype=self.dtype)
        halves = [half[:, 0] for half in layout.stacks(weights, slot.bucket)["group"]]
        for half, width in zip(halves, (halves[0].shape[-1], *[slot.bucket] * 9), strict=False):
            half.normal_(std=width**-0.5)
        self.stacks.load(slot, HostAdapter("", slot.bucket, weights))
        self.worn[slot] = tuple(half.to(self.arena.memory.device) for half in halves)

    def tiles(self, worn: Worn, height: int, dead: int = 0) -> lora.LoraTiles:
        """Cut tiles; `dead` ones follow those of `worn`."""
        tiles = [*lora.cut_tiles(worn, height), *[0] * lora.TILE * dead]
        table = numbers(tiles, self.arena.memory.device).view(-1, lora.TILE)
        return lora.LoraTiles(table, height)

    def apply(self, x: torch.Tensor, worn: Worn, height: int, dead: int = 0) -> torch.Tensor:
        """Return what the kernels add on layer 1."""
        return lora.lora(x, self.tiles(worn, height, dead), self.arena, "group", 1)

    def exact(self, x: torch.Tensor, worn: Worn) -> torch.Tensor:
        outputs = sum(self.arena.places["group"].outputs)
        exact, start = torch.zeros(len(x), outputs, dtype=torch.float64, device=x.device), 0
        for slot, rows in worn:
            own = slice(start, start + rows)
            if slot is not None:
                a, *bs = (half[1].double() for half in self.worn[slot])
                shrunk = (x[own].double() @ a.T).split(slot.bucket, dim=1)
                parts = [narrow @ b for narrow, b in zip(shrunk, bs, strict=True)]
                exact[own] = torch.cat(parts, dim=1)
            start += rows
        return exact


HEIGHTS = pytest.mark.parametrize("height", [lora.DECODE_HEIGHT, lora.PROMPT_HEIGHT])


@HEIGHTS
@pytest.mark.parametrize("outputs", [(33,), (48, 16, 150)])
def test_lora_of_every_rank_equals_float64_in_one_batch(
    device: torch.device, dtype: torch.dtype, outputs: tuple[int, ...], height: int
) -> None:
    slots = [Slot(8, 3), Slot(16, 0), Slot(32, 1), Slot(64, 1), Slot(128, 1), Slot(256, 2)]
    wardrobe = Wardrobe(150, outputs, slots, device, dtype)
    worn = [(None, 2), *((slot, 1) for slot in slots), (slots[0], 18), (None, 1)]
    rows = sum(count for _, count in worn)
    x = torch.randn(rows, 150, device=device).to(dtype)
    ours = wardrobe.apply(x, worn, height, dead=2)
    close(ours, wardrobe.exact(x, worn), 2.0)
    assert not ours[:2].any()
    assert not ours[-1].any()


MANY = 2 * lora.PROMPT_HEIGHT + 9  # rows


@pytest.mark.parametrize(
    ("height", "fewest"),
    [(lora.PROMPT_HEIGHT, False), (lora.PROMPT_HEIGHT, True), (lora.DECODE_HEIGHT, True)],
)
def test_prompts_equal_float64_whoever_wears_what(
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    fewest: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs are split, programs walk from tile to tile, and what nobody wrote is NaN."""
    if fewest:
        share_out_to_few(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
    slots = [Slot(8, 3), Slot(64, 1), Slot(256, 1)]
    wardrobe = Wardrobe(331, (101, 101), slots, device, dtype)
    wardrobe.stacks.arena[: wardrobe.arena.unit] = math.nan  # an empty slot
    worn = [(slots[1], 3), (None, 2), (slots[0], MANY - 12), (slots[2], 6), (None, 1)]
    x = torch.randn(MANY, 331, device=device).to(dtype)
    exact, tiles = wardrobe.exact(x, worn), wardrobe.tiles(worn, height, dead=20)
    # A(x) is rounded between A and B, which alone can be 1.14 times a scale of 2.0 in bfloat16.
    close(wardrobe.apply(x, worn, height, dead=20), exact, 3.0)
    gate_up = torch.randn(MANY, 202, device=device).to(dtype)
    gated = adapted_silu_mul(gate_up, x, tiles, wardrobe.arena, "group", 1)
    close(gated, torch_silu_mul(gate_up.double() + exact), 4.0)
    again = adapted_silu_mul(gate_up, x, tiles, wardrobe.arena, "group", 1)
    assert torch.equal(gated, again)
    with pytest.raises(AssertionError):
        close(gated, torch_silu_mul(gate_up.double()), 4.0)


def test_lora_of_a_wrong_slot_exceeds_the_bound(device: torch.device, dtype: torch.dtype) -> None:
    slots = [Slot(16, 1), Slot(16, 2)]
    wardrobe = Wardrobe(64, (48,), slots, device, dtype)
    x = torch.randn(6, 64, device=device).to(dtype)
    ours = wardrobe.apply(x, [(slots[0], 6)], lora.DECODE_HEIGHT)
    with pytest.raises(AssertionError):
        close(ours, wardrobe.exact(x, [(slots[1], 6)]), 2.0)


def test_lora_reads_what_is_in_a_slot_now(device: torch.device, dtype: torch.dtype) -> None:
    """Nothing of a launch depends on the adapter: the same one serves what comes after a swap."""
    slot = Slot(8, 1)
    wardrobe = Wardrobe(64, (48,), [slot], device, dtype)
    x = torch.randn(3, 64, device=device).to(dtype)
    first = wardrobe.apply(x, [(slot, 3)], lora.DECODE_HEIGHT)
    wardrobe.load(slot)
    again = wardrobe.apply(x, [(slot, 3)], lora.DECODE_HEIGHT)
    close(again, wardrobe.exact(x, [(slot, 3)]), 2.0)
    assert not torch.equal(again, first)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_alone(
    device: torch.device, dtype: torch.dtype, poison: float
) -> None:
    """In every operator the other rows are the same to the last bit."""
    x = torch.randn(4, 64, device=device).to(dtype)
    sick = x.clone()
    sick[2, 3] = poison
    others = [0, 1, 3]
    gain = torch.ones(64, device=device).to(dtype)
    keys = torch.randn(4, 1, 70, 16, device=device).to(dtype)
    pages = in_pages(keys, keys)
    slots, positions = numbers(range(4), device), numbers([0, 20, 69, 5], device)
    tiles = numbers([0, 2, 0, 20, 2, 2, 1, 30], device).view(2, 4)
    slot = Slot(8, 1)
    wardrobe = Wardrobe(64, (40,), [slot], device, dtype)

    def outputs(x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield rms_norm(x, gain, 1e-5)
        yield silu_mul(x)
        out = torch.empty(4, 2, 16, device=device).to(dtype)
        attention.decode_attention(x.view(4, 4, 16), pages, slots, positions, None, out)
        yield out
        attention.chunk_attention(x.view(4, 4, 16), pages, tiles, None, out)
        yield out
        yield wardrobe.apply(x, [(None, 1), (slot, 3)], lora.DECODE_HEIGHT)

    for healthy, poisoned in zip(outputs(x), outputs(sick), strict=True):
        assert torch.equal(healthy[others], poisoned[others])
        assert not poisoned[2].isfinite().all()
