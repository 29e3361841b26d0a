"""The structures of the headers here, field by field, and how tensors become them."""

from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_void_p
from ctypes import pointer as ctypes_pointer
from typing import Any

import torch

from serving.engine.ops.lora import Run
from serving.engine.vectors import Dressed

MOST_PARTS = 3  # linears fused in one group
FORMATS = {"F32": 0, "BF16": 1, "F16": 2}  # of numbers in a safetensors file

Stacks = Mapping[int, tuple[torch.Tensor, ...]]  # bucket → A, B's, all of them [layers, slots, …]


class LinearC(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class LayerC(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, LinearC) for name in ("qkv", "o", "gate_up", "down")),
        ("window", c_int64),
    )


class ModelC(Structure):
    _fields_ = (
        *(
            (name, c_int64)
            for name in ("layers", "hidden", "heads", "kv_heads", "dim", "intermediate", "vocab")
        ),
        ("eps", c_float),
        ("layer", POINTER(LayerC)),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", LinearC),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class RunC(Structure):
    _fields_ = tuple((name, c_int64) for name in ("start", "stop", "stack", "slot"))


class HalfC(Structure):
    _fields_ = (("first", c_void_p), ("layer", c_int64), ("slot", c_int64))


class StackC(Structure):
    _fields_ = (("rank", c_int64), ("a", HalfC), ("b", HalfC * MOST_PARTS))


class VectorsC(Structure):
    _fields_ = (("scale", c_void_p * 4), ("shift", c_void_p * 4), ("norms", c_void_p))


class GroupC(Structure):
    _fields_ = (("inputs", c_int64), ("parts", c_int64), ("outputs", c_int64 * MOST_PARTS))


class CacheC(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        *((name, c_int64) for name in ("kv_heads", "length", "dim")),
    )


class RopeC(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("cos", "sin", "query_norm", "key_norm")),
        ("eps", c_float),
    )


class FileTensorC(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("start", "format", "rows", "columns")),
        *((name, c_int64) for name in ("to", "rank", "first")),
        ("scale", c_float),
    )


class BlocksC(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("kept", "keys", "values")),
        *((name, c_int64) for name in ("layers", "slots", "kv_heads", "slot_blocks", "width")),
    )


class WishC(Structure):
    _fields_ = (
        ("temperature", c_double),
        ("top_k", c_int64),
        *((name, c_double) for name in ("top_p", "min_p", "uniform")),
    )


class StepC(Structure):
    _fields_ = (
        ("rows", c_int64),
        ("sampled", c_int64),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "sampled_rows")),
        ("cache_slots", c_int64),
        ("cache_length", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("runs", c_int64),
        ("run", POINTER(RunC)),
        ("stacks", POINTER(StackC) * 4),
        ("vectors", POINTER(POINTER(VectorsC))),
        ("embedded", c_void_p),
        *(
            (name, c_void_p)
            for name in ("x", "h", "qkv", "attended", "gate_up", "activated", "logits")
        ),
    )


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def stack_table(stacks: Stacks) -> Any:
    """Return the stacks as an array, the lowest rank first."""
    table = (StackC * len(stacks))()
    for entry, rank in zip(table, sorted(stacks), strict=True):
        a, *bs = stacks[rank]
        entry.rank, entry.a = rank, _half(a)
        entry.b[: len(bs)] = [_half(b) for b in bs]
    return table


def _half(matrices: torch.Tensor) -> HalfC:
    """Layers and slots may be apart; each matrix is one piece."""
    layer, slot, *inside = matrices.stride()
    assert inside == [matrices.shape[3], 1], inside
    return HalfC(matrices.data_ptr(), layer, slot)


def run_table(runs: Sequence[Run], ranks: Iterable[int]) -> Any:
    """Return the runs as an array; each names its stack by its place in `stack_table`."""
    place = {rank: index for index, rank in enumerate(sorted(ranks))}
    return (RunC * len(runs))(
        *(RunC(run.start, run.stop, place[run.slot.bucket], run.slot.row) for run in runs)
    )


def vectors_table(dressed: Dressed, groups: Sequence[str], rows: int) -> Any:
    """Return for each row what it wears, null for nothing; the structures live with the array."""
    table = (POINTER(VectorsC) * rows)()
    for worn, vectors in dressed:
        entry = VectorsC(norms=pointer(vectors.norms))
        for number, group in enumerate(groups):
            if group in vectors.outputs:
                scale, shift = vectors.outputs[group]
                entry.scale[number], entry.shift[number] = scale.data_ptr(), shift.data_ptr()
        table[worn.start : worn.stop] = [ctypes_pointer(entry)] * (worn.stop - worn.start)
    return table


def embedded_table(ids: torch.Tensor, dressed: Dressed) -> torch.Tensor:
    """Return for each row the address of its input, 0 where that is the token's own embedding."""
    table = torch.zeros_like(ids)
    for rows, vectors in dressed:
        if vectors.embedding is not None:
            here, place = vectors.embedding.find(ids[rows])
            own = vectors.embedding.rows
            table[rows][here] = own.data_ptr() + place * own.stride(0) * own.element_size()
    return table
