"""What rows wear beside LoRA, by the Triton operators: against float64 and torch."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from serving.engine.ops.norm import rms_norm as torch_rms_norm
from serving.engine.ops.triton.norm import add_rms_norm, rms_norm
from serving.engine.ops.triton.vectors import VectorBook, table_of
from serving.engine.vector_file import FileVectors
from serving.engine.vectors import (
    TokenRows,
    Vectors,
    dress_embeddings,
    dress_norm,
    dress_outputs,
)
from tests.serving.engine.kernels import close, in_two_formats, numbers, on_every_device

pytestmark = [on_every_device, in_two_formats]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(3)


LAYERS, HIDDEN = 3, 20
WIDTHS = {"qkv": 1030, "o": HIDDEN, "gate_up": 64, "down": HIDDEN}


def random_vectors(dtype: torch.dtype) -> Vectors:
    """Return vectors with everything but a prefix."""
    outputs = {
        name: (torch.randn(LAYERS, width), torch.randn(LAYERS, width))
        for name, width in WIDTHS.items()
    }
    norms = torch.rand(2 * LAYERS + 1, HIDDEN).to(dtype)
    ids = torch.tensor([-2, -1, 3, 4, 90])
    tokens = TokenRows(ids, torch.randn(len(ids), HIDDEN).to(dtype))
    return Vectors(outputs, norms, tokens, None, None, 2)


class Dressing:
    """Five rows: the second and third wear one adapter's vectors, the last one another's.

    The other one has a scale of `o` only. What in the arena is nobody's is NaN.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        whole = random_vectors(dtype)
        few = replace(whole, outputs={"o": whole.outputs["o"]}, norms=None, embedding=None)
        self.arena = torch.full((1 << 16,), math.nan, dtype=dtype, device=device)
        self.dressed = tuple(
            (rows, self._put(vectors, self.arena[start:]))
            for rows, vectors, start in ((slice(1, 3), whole, 24), (slice(4, 5), few, 1 << 15))
        )
        self.book = VectorBook(self.arena)
        self.table = torch.from_numpy(table_of(self.book.places(self.dressed), 5)).to(device)

    @staticmethod
    def _put(vectors: Vectors, memory: torch.Tensor) -> Vectors:
        room = memory[: vectors.size_bytes // memory.itemsize]
        return FileVectors(vectors, None, None).write(room)


@pytest.mark.parametrize("group", WIDTHS)
def test_scales_and_shifts_of_each_row_equal_float64(
    device: torch.device, dtype: torch.dtype, group: str
) -> None:
    own = Dressing(device, dtype)
    y, added = torch.randn(2, 5, WIDTHS[group], device=device).to(dtype)
    exact = y.double() + added.double()
    bare = exact.clone()
    dress_outputs(exact, group, 1, own.dressed)
    own.book.dress(y, added, own.table, group, 1)
    worn = [1, 2, 4] if group == "o" else [1, 2]
    close(y[worn], exact[worn], 4.0)
    close(y.double().add(added.double()).to(dtype), exact, 4.0)
    with pytest.raises(AssertionError):
        close(y[worn], bare[worn], 4.0)


def test_norms_of_each_row_equal_float64(device: torch.device, dtype: torch.dtype) -> None:
    own = Dressing(device, dtype)
    x, delta, lora = torch.randn(3, 5, HIDDEN, device=device).to(dtype)
    weight = torch.rand(HIDDEN, device=device).to(dtype)

    def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return torch_rms_norm(x.double(), weight.double(), eps)

    for number in (0, 2 * LAYERS):
        exact = exact_norm(x, weight, 1e-5)
        dress_norm(exact, x, exact_norm, 1e-5, number, own.dressed)
        close(rms_norm(x, weight, 1e-5, own.book.norms(own.table, number)), exact)
        with pytest.raises(AssertionError):
            close(rms_norm(x, weight, 1e-5), exact)
    added = add_rms_norm(x, delta, lora, weight, 1e-5, own.book.norms(own.table, 3))
    exact = exact_norm(x, weight, 1e-5)
    dress_norm(exact, x, exact_norm, 1e-5, 3, own.dressed)
    close(added, exact)


@pytest.mark.parametrize("ids", [(3, 4, 90, 3, 3), (3, -2, -1, 4, 4), (4, 91, 5, -1, 90)])
def test_tokens_of_each_row_are_found_or_the_bases(
    device: torch.device, dtype: torch.dtype, ids: Sequence[int]
) -> None:
    own = Dressing(device, dtype)
    x = torch.randn(5, HIDDEN, device=device).to(dtype)
    exact = x.clone()
    dress_embeddings(exact, torch.tensor(ids, device=device), own.dressed)
    own.book.embed(x, numbers(ids, device), own.table)
    assert torch.equal(x, exact)


def test_rows_behind_a_batch_wear_nothing(device: torch.device, dtype: torch.dtype) -> None:
    """As dead rows of a captured step."""
    own = Dressing(device, dtype)
    table = torch.from_numpy(table_of((), 5)).to(device)
    # Else each kernel would be compiled once more when rows are odd, in the middle of serving.
    assert all(field.data_ptr() % 16 == 0 for field in table)
    x, added = torch.randn(2, 5, HIDDEN, device=device).to(dtype)
    before, weight = x.clone(), torch.rand(HIDDEN, device=device).to(dtype)
    own.book.embed(x, numbers([-1, -2, 3, 0, 0], device), table)
    own.book.dress(x, added, table, "o", 1)
    assert torch.equal(x, before)
    assert torch.equal(
        rms_norm(x, weight, 1e-5, own.book.norms(table, 0)), rms_norm(x, weight, 1e-5)
    )


def test_what_no_table_says_needs_none(device: torch.device, dtype: torch.dtype) -> None:
    own = Dressing(device, dtype)
    rows, whole = own.dressed[0]
    head = replace(whole, outputs={}, norms=None, embedding=None, head=whole.embedding)
    assert own.book.places([(rows, head)]) == []
    assert [where for where, _ in own.book.places(own.dressed)] == [rows, slice(4, 5)]


def test_what_comes_to_where_others_were_is_found_anew(
    device: torch.device, dtype: torch.dtype
) -> None:
    own = Dressing(device, dtype)
    rows, before = own.dressed[0]
    few = replace(before, norms=None, embedding=None)
    there = few.laid_out(own.arena[24:][: few.size_bytes // own.arena.itemsize])
    assert there.tensors()[0].data_ptr() == before.tensors()[0].data_ptr()
    places, fresh = (book.places([(rows, there)]) for book in (own.book, VectorBook(own.arena)))
    assert places == fresh
    assert places != own.book.places([(rows, before)])
