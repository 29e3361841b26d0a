"""The compiled operators as Python calls on tensors; each has the shapes of its torch body.

One call holds no lock of the interpreter while it runs, so the server's event loop goes on.
"""

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_float, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch

from serving.engine.ops.blocks import BlockCopy, Slots
from serving.engine.ops.lora import Run
from serving.engine.ops.native.compile import CompilerFailed, NotCompiled, compiled
from serving.engine.ops.native.layout import (
    MOST_PARTS,
    BlocksC,
    CacheC,
    FileTensorC,
    GroupC,
    ModelC,
    RopeC,
    RunC,
    StackC,
    Stacks,
    StepC,
    WishC,
    pointer,
    run_table,
    stack_table,
)
from serving.engine.ops.native.target import AMX_BF16, Target, runnable_targets
from serving.engine.ops.sampling import Shape

logger = logging.getLogger(__name__)

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linear": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, *(c_int64,) * 5),
    "rms_norm": (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_float),
    "silu_mul_rows": (c_void_p, c_int64, c_void_p, c_int64, c_int64),
    "rotate_and_store": (
        *(c_void_p, c_int64, c_int64, c_int64),
        *(POINTER(RopeC), POINTER(CacheC), c_void_p, c_void_p),
    ),
    "attention": (
        *(c_void_p, c_int64, c_int64, c_int64),
        *(POINTER(CacheC), c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "lora": (
        *(c_void_p, c_int64, c_void_p, c_int64),
        *(POINTER(GroupC), POINTER(StackC), POINTER(RunC), c_int64, c_int64),
    ),
    "sample_rows": (c_void_p, c_int64, c_int64, c_int64, POINTER(WishC), c_void_p),
    "greedy_rows": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "copy_blocks": (POINTER(BlocksC), POINTER(c_int64), *(c_int64,) * 4, POINTER(c_uint8)),
    "write_adapter": (c_char_p, POINTER(FileTensorC), c_int64, c_void_p),
    "forward": (POINTER(ModelC), POINTER(StepC)),
}
_RESULTS = {"write_adapter": c_int64}


class Library:
    """One build of the operators: for one number format and one set of instructions."""

    def __init__(self, path: Path, target: Target, dtype: torch.dtype) -> None:
        if not target.allowed():
            raise NotCompiled(f"Linux does not let this process use {target.name}")
        self.target, self.dtype = target, dtype
        # Whether the processor multiplies matrices here, not vectors.
        self.matrices = target is AMX_BF16 and dtype == target.dtype
        try:
            self._calls = ctypes.CDLL(str(path))
        except OSError as error:  # no OpenMP runtime in this torch, for example
            raise NotCompiled(f"the built operators cannot be loaded: {error}") from error
        for name, types in _ARGUMENTS.items():
            call = getattr(self._calls, name)
            call.argtypes, call.restype = types, _RESULTS.get(name)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x Wᵀ + b [rows, outputs], W packed; with `out`, add it to that."""
        x = self._rows(x)
        add = out is not None
        y = x.new_empty(len(x), outputs) if out is None else self._own(out)
        self._calls.linear(
            *(x.data_ptr(), x.stride(0), weight.data_ptr(), pointer(bias)),
            *(y.data_ptr(), y.stride(0), len(x), x.shape[1], outputs, add),
        )
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = self._rows(x)
        y = x.new_empty(x.shape)
        self._calls.rms_norm(
            x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), *x.shape, eps
        )
        return y

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        x = self._rows(gate_up)
        y = x.new_empty(len(x), x.shape[1] // 2)
        self._calls.silu_mul_rows(x.data_ptr(), x.stride(0), y.data_ptr(), *y.shape)
        return y

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotate the queries of qkv [rows, heads + 2 · kv_heads, dim] in place; store the rest.

        cos and sin are float32 [length, dim / 2], values [slots, kv_heads, length, dim]; keys are
        packed (see `KVCache`). The keys of qkv are rotated in place, too.
        """
        query_norm, key_norm = norms or (None, None)
        rope = RopeC(cos.data_ptr(), sin.data_ptr(), pointer(query_norm), pointer(key_norm), eps)
        cache, rows = self._cache(keys, values), self._own(qkv.flatten(1))
        heads = qkv.shape[1] - 2 * keys.shape[1]
        self._calls.rotate_and_store(
            *(rows.data_ptr(), rows.stride(0), len(rows), heads),
            *(rope, cache, slots.data_ptr(), positions.data_ptr()),
        )

    def attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        window: int | None = None,
    ) -> torch.Tensor:
        """Return [rows, heads, dim] for q of that shape: each row sees positions up to its own.

        Keys are packed (see `KVCache`).
        """
        rows, out = self._rows(q.flatten(1)), q.new_empty(q.shape)
        self._calls.attention(
            *(rows.data_ptr(), rows.stride(0), len(rows), q.shape[1]),
            *(self._cache(keys, values), slots.data_ptr(), positions.data_ptr()),
            *(window or 0, out.data_ptr()),
        )
        return out

    def lora(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        stacks: Stacks,
        outputs: Sequence[int],
        layer: int,
        runs: Sequence[Run],
    ) -> None:
        """Add B(A(x)) of each run's own adapter to y in place; `outputs` are those of the parts.

        Every B is packed, as `engine.lora.pack_b` does it.
        """
        x, y = self._rows(x), self._own(y)
        group = GroupC(x.shape[1], len(outputs), (c_int64 * MOST_PARTS)(*outputs))
        self._calls.lora(
            *(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0)),
            *(group, stack_table(stacks), run_table(runs, stacks), len(runs), layer),
        )

    def greedy(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each row's first most likely token, and whether all its scores are finite."""
        scores = self._rows(scores)
        tokens = torch.empty(len(scores), dtype=torch.int64)
        finite = torch.empty(len(scores), dtype=torch.bool)
        self._calls.greedy_rows(
            *(scores.data_ptr(), scores.stride(0), *scores.shape),
            *(tokens.data_ptr(), finite.data_ptr()),
        )
        return tokens, finite

    def sample(self, scores: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Draw a token for each row of float32 scores; see `ops.sampling.sample`."""
        assert scores.dtype == torch.float32, scores.dtype
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        columns = (shape.temperature, shape.top_k, shape.top_p, shape.min_p, shape.uniform)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        wishes = (WishC * len(scores))(*(WishC(*row) for row in rows))
        tokens = torch.empty(len(scores), dtype=torch.int64)
        self._calls.sample_rows(
            scores.data_ptr(), scores.stride(0), *scores.shape, wishes, tokens.data_ptr()
        )
        return tokens

    def copy_blocks(self, kept: torch.Tensor, slots: Slots, copy: BlockCopy) -> bool:
        """See `ops.blocks`. Numbers that are finite give no false alarm here."""
        (keys, values), blocks, first = slots, copy.blocks, copy.first
        assert kept.is_contiguous()
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert all(block < len(kept) for block in blocks)
        assert first + len(blocks) <= keys.shape[3]
        shape = BlocksC(kept.data_ptr(), keys.data_ptr(), values.data_ptr(), *keys.shape)
        finite = c_uint8()
        numbers = (c_int64 * len(blocks))(*blocks)
        self._calls.copy_blocks(shape, numbers, len(blocks), copy.slot, first, copy.back, finite)
        return bool(finite.value)

    def write_adapter(self, file: bytes, tensors: Any, adapter: torch.Tensor) -> int:
        """Write A's and B's of a safetensors file, an array of FileTensorC, into an adapter.

        Returns the place of the first one with a number that is not finite there, or how many there
        are. They must lie within the file and the adapter.
        """
        assert adapter.dtype == self.dtype
        assert adapter.is_contiguous()
        return self._calls.write_adapter(file, tensors, len(tensors), adapter.data_ptr())

    def forward(self, model: ModelC, step: StepC) -> None:
        """Run a whole step; both must hold addresses of tensors that are still alive."""
        self._calls.forward(model, step)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows that are apart are taken as they are; numbers that are apart are copied together."""
        assert x.dtype == self.dtype, f"{x.dtype} given to operators of {self.dtype}"
        return x if x.stride(1) == 1 or not len(x) else x.contiguous()

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        """Like `_rows`, for what is written: a copy would be lost."""
        assert x.dtype == self.dtype
        assert x.stride(1) == 1
        return x

    def _cache(self, keys: torch.Tensor, values: torch.Tensor) -> CacheC:
        assert keys.is_contiguous()
        assert values.is_contiguous()
        return CacheC(keys.data_ptr(), values.data_ptr(), *values.shape[1:])


def load_library(dtype: torch.dtype, cache: Path, target: Target | None = None) -> Library:
    """Build what is not built, and load it. Raises NotCompiled with the reason.

    Without a target it is the best one for this processor that the compiler knows.
    """
    reasons: list[CompilerFailed] = []
    for each in runnable_targets(dtype) if target is None else (target,):
        try:
            library = Library(compiled(each, dtype, cache), each, dtype)
        except CompilerFailed as reason:
            reasons.append(reason)
            continue
        if reasons:
            logger.warning("C++ (%s) computes, not the best there is: %s", each.name, reasons[0])
        return library
    raise reasons[0]
