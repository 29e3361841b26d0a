"""Compile every Triton kernel for a GPU that need not be here, at the shapes of Llama 3.1 8B.

    python -m tests.serving.engine.compile_kernels 90    # compute capability 9.0

Prints each kernel with the shared memory it takes. Triton is asked for machine code, so what its
interpreter allows and its compiler does not is found on a CPU. Not in a process that interprets.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from serving.engine.kv_cache import BLOCK
from serving.engine.kv_pages import LayerPages
from serving.engine.lora import LoraLayout, LoraStacks
from serving.engine.ops.rope import rope_angles
from serving.engine.ops.triton import attention, lora
from serving.engine.ops.triton.activation import adapted_silu_mul, silu_mul
from serving.engine.ops.triton.norm import add_rms_norm, rms_norm
from serving.engine.ops.triton.rope import rotate_and_store
from serving.engine.ops.triton.vectors import VectorBook, table_of
from serving.engine.spec import LinearGroup

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = {"num_stages", "num_warps", "maxnreg"}
ALIGNED = [["tt.divisibility", 16]]
HEADS, KV_HEADS, DIM, HIDDEN = 32, 8, 128, 4096


def compile_launches(capability: int) -> None:
    """Let every launch from now on compile its kernel, as a launch on that GPU would."""

    def run(
        kernel: JITFunction[Any], *args: object, grid: object, warmup: bool, **named: object
    ) -> None:
        options = {name: named.pop(name) for name in named.keys() & OPTIONS}
        given = inspect.signature(kernel.fn).bind(*args, **named).arguments
        types, fixed, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or value is None:
                types[name], fixed[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[name], attributes[(index,)] = POINTERS[value.dtype], ALIGNED
            elif isinstance(value, int):
                types[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = ALIGNED
            else:
                types[name] = "fp32"
        source = ASTSource(kernel, types, fixed, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        print(kernel.fn.__name__, made.metadata.shared)

    JITFunction.run = run  # type: ignore[method-assign]  # in a process of its own


def launches(dtype: torch.dtype) -> list[Callable[[], object]]:
    x, weight = torch.zeros(4, HIDDEN, dtype=dtype), torch.zeros(HIDDEN, dtype=dtype)
    numbers, tiles = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 4, dtype=torch.int32)
    many = torch.zeros(128, dtype=torch.int32)
    qkv = torch.zeros(128, HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
    keys, out = torch.zeros(4, KV_HEADS, BLOCK, DIM, dtype=dtype), qkv[:, :HEADS].contiguous()
    pages = LayerPages(keys, keys, tiles)
    store = (qkv, *rope_angles(torch.ones(DIM // 2), 64), numbers, numbers, pages)
    groups = (
        LinearGroup("qkv", ("q", "k", "v"), HIDDEN, (HIDDEN, 1024, 1024)),
        LinearGroup("gate_up", ("gate", "up"), HIDDEN, (14336, 14336)),
    )
    stacks = LoraStacks(LoraLayout(2, groups), 1, dtype, torch.device("cpu"))
    arena, gate_up = lora.Arena(stacks), torch.zeros(4, 2 * 14336, dtype=dtype)
    high = lora.LoraTiles(tiles, lora.PROMPT_HEIGHT)
    book, table = VectorBook(stacks.arena), torch.from_numpy(table_of((), 4))

    def adapt(height: int, group: str) -> None:
        lora.lora(x, lora.LoraTiles(tiles, height), arena, group, 1)

    return [
        lambda: rms_norm(x, weight, 1e-5),
        lambda: add_rms_norm(x, x.clone(), None, weight, 1e-5),
        lambda: add_rms_norm(x, x.clone(), x.clone(), weight, 1e-5),
        lambda: rms_norm(x, weight, 1e-5, book.norms(table, 0)),
        lambda: add_rms_norm(x, x.clone(), x.clone(), weight, 1e-5, book.norms(table, 1)),
        lambda: book.dress(gate_up, gate_up.clone(), table, "gate_up", 1),
        lambda: book.embed(x, numbers, table),
        lambda: silu_mul(gate_up),
        lambda: silu_mul(gate_up, gate_up.clone()),
        lambda: rotate_and_store(*store),
        lambda: rotate_and_store(*store, qkv.clone(), (weight[:DIM], weight[:DIM]), 1e-6),
        lambda: attention.decode_attention(qkv, pages, numbers, numbers, None, out),
        lambda: attention.decode_attention(qkv, pages, many, many, 4096, out),
        lambda: attention.chunk_attention(qkv, pages, tiles, None, out),
        lambda: adapt(lora.DECODE_HEIGHT, "qkv"),
        lambda: adapt(lora.PROMPT_HEIGHT, "qkv"),
        lambda: adapt(lora.PROMPT_HEIGHT, "gate_up"),
        lambda: adapted_silu_mul(gate_up, x, high, arena, "gate_up", 1),
    ]


if __name__ == "__main__":
    compile_launches(int(sys.argv[1]))
    for kind in sys.argv[2:]:
        for launch in launches(getattr(torch, kind)):
            launch()
