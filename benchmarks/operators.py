"""Microseconds of each compiled operator beside its floor, at SmolLM2-135M's shapes.

    python -m benchmarks.operators [--rows 1 8 32] [--dtype bfloat16] [--threads 1]
        [--plot FILE]

The floor of an operator is the larger of its bytes over the read bandwidth and of its
multiplications over the rate of a large matrix product. Both are measured just before, by torch or
these operators, whichever is faster, so it moves with the load of the machine as the operator does.
Weights, adapters and caches of all 30 layers are walked through, so that each call reads memory and
not a cache. The minimum of `--repeats` walks. What no rows take part in is copied: blocks of the
prefix cache, and a file of an adapter.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from safetensors.torch import save

from benchmarks.engine_step import SMOLLM2_135M
from benchmarks.floor import fastest, product_rate, read_rate
from benchmarks.plots import Bar, Plot, add_option, draw_bars
from benchmarks.throughput import cpu_name
from registry.adapter import AdapterRef
from registry.home import default_cache
from serving.engine.adapter_file import AdapterReader
from serving.engine.boundary import AdapterFiles
from serving.engine.hardware import choose_dtype
from serving.engine.kv_cache import BLOCK
from serving.engine.linear import pack
from serving.engine.lora import LoraLayout, pack_b
from serving.engine.ops.blocks import BlockCopy
from serving.engine.ops.lora import Run
from serving.engine.ops.native.library import Library, load_library
from serving.engine.ops.rope import rope_angles
from serving.engine.ops.sampling import Shape
from serving.engine.slots import Slot

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, WIDE, VOCAB, RANK = 30, 576, 9, 3, 64, 1536, 49152, 16
CONTEXT, LENGTH = 160, 256
QKV = (HEADS + 2 * KV_HEADS) * DIM

Walk = Callable[[int], object]  # layer → one call


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    call: Walk
    bytes: int  # read and written by one call
    operations: int = 0  # multiplications and additions


def cases(ops: Library, rows: int) -> Iterator[Case]:
    size = ops.dtype.itemsize

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(ops.dtype)

    for name, outputs, inputs in (
        *(("linear qkv", QKV, HIDDEN), ("linear o", HIDDEN, HIDDEN)),
        *(("linear gate_up", 2 * WIDE, HIDDEN), ("linear down", HIDDEN, WIDE)),
    ):
        weights, x = [pack(normal(outputs, inputs)) for _ in range(LAYERS)], normal(rows, inputs)
        yield Case(
            name,
            lambda i, w=weights, x=x, n=outputs: ops.linear(x, w[i], None, n),
            size * (outputs * inputs + rows * (inputs + outputs)),
            2 * rows * outputs * inputs,
        )
    head, x = pack(normal(VOCAB, HIDDEN)), normal(rows, HIDDEN)
    yield Case(
        "linear head",
        lambda _: ops.linear(x, head, None, VOCAB),
        size * (VOCAB * HIDDEN + rows * VOCAB),
        2 * rows * VOCAB * HIDDEN,
    )
    scores = normal(rows, VOCAB)
    yield Case("greedy", lambda _: ops.greedy(scores), size * rows * VOCAB)
    drawn = torch.randn(rows, VOCAB)
    column = torch.ones(rows, dtype=torch.float64)
    wish = Shape(0.7 * column, 0 * column.long(), 0.9 * column, 0 * column, 0.5 * column)
    yield Case("sample, top_p 0.9", lambda _: ops.sample(drawn, wish), drawn.nbytes)
    gain, gated = normal(HIDDEN), normal(rows, 2 * WIDE)
    yield Case("rms_norm", lambda _: ops.rms_norm(x, gain, 1e-5), 2 * size * rows * HIDDEN)
    yield Case("silu_mul", lambda _: ops.silu_mul(gated), 3 * size * rows * WIDE)
    yield from attention_cases(ops, rows)
    for adapters in sorted({1, min(8, rows), rows}):
        yield lora_case(ops, rows, adapters)


def attention_cases(ops: Library, rows: int) -> Iterator[Case]:
    keys, values = torch.randn(2, LAYERS, rows, KV_HEADS, LENGTH, DIM).to(ops.dtype)
    qkv = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM).to(ops.dtype)
    angles = rope_angles(torch.tensor([1e5 ** (-i / 32) for i in range(32)]), LENGTH)
    slots, positions = torch.arange(rows), torch.full((rows,), CONTEXT)
    row = ops.dtype.itemsize * rows * DIM
    yield Case(
        "rotate_and_store",
        lambda i: ops.rotate_and_store(qkv, *angles, slots, positions, keys[i], values[i]),
        row * (2 * HEADS + 4 * KV_HEADS),
    )
    q = qkv[:, :HEADS]
    yield Case(
        f"attention, {CONTEXT} keys",
        lambda i: ops.attention(q, keys[i], values[i], slots, positions),
        row * (2 * HEADS + 2 * KV_HEADS * (CONTEXT + 1)),
        4 * rows * HEADS * DIM * (CONTEXT + 1),
    )


def lora_case(ops: Library, rows: int, adapters: int) -> Case:
    """Gate and up: the widest group."""
    a = torch.randn(LAYERS, adapters, 2 * RANK, HIDDEN).to(ops.dtype)
    bs = [pack_b(torch.randn(LAYERS, adapters, WIDE, RANK).to(ops.dtype), 0) for _ in range(2)]
    x, y = torch.randn(rows, HIDDEN).to(ops.dtype), torch.randn(rows, 2 * WIDE).to(ops.dtype)
    share = rows // adapters
    runs = [Run(i * share, (i + 1) * share, Slot(RANK, i)) for i in range(adapters)]
    parameters = RANK * (2 * HIDDEN + 2 * WIDE)
    return Case(
        f"lora gate_up, {adapters} adapters",
        lambda i: ops.lora(y, x, {RANK: (a, *bs)}, (WIDE, WIDE), i, runs),
        ops.dtype.itemsize * (adapters * parameters + rows * (HIDDEN + 4 * WIDE)),
        2 * rows * parameters,
    )


def copy_cases(ops: Library) -> Iterator[Case]:
    count, slots = CONTEXT // BLOCK, 32
    shape = (LAYERS, slots, KV_HEADS, LENGTH // BLOCK, BLOCK * DIM)
    keys, values = torch.randn(2, *shape).to(ops.dtype)
    kept = torch.zeros(count * LAYERS, 2, LAYERS, KV_HEADS, BLOCK * DIM, dtype=ops.dtype)

    def copy(i: int, *, back: bool) -> None:
        blocks = range(count * i, count * (i + 1))
        ops.copy_blocks(kept, (keys, values), BlockCopy(blocks, i, back=back))

    both = 2 * kept[:count].nbytes
    yield Case(f"blocks of {CONTEXT} tokens, kept", lambda i: copy(i, back=False), both)
    yield Case(f"blocks of {CONTEXT} tokens, taken over", lambda i: copy(i, back=True), both)
    layout = LoraLayout(LAYERS, SMOLLM2_135M.groups, packed=True)
    reader, ref = (
        AdapterReader(layout, ops.dtype, RANK, library=ops),
        AdapterRef("0" * 64, "a/a@v1"),
    )
    for dtype in (torch.float32, torch.bfloat16):
        files = adapter_files(layout, dtype)
        size = sum(map(len, files.weights)) + layout.size(RANK) * ops.dtype.itemsize
        name = f"adapter file, {str(dtype)[6:]}"
        yield Case(name, lambda _, files=files: reader.read(files, ref), size)


def adapter_files(layout: LoraLayout, dtype: torch.dtype) -> AdapterFiles:
    """Return an adapter of all linears."""
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layout.layers):
        for group in layout.groups:
            for module, outputs in zip(group.modules, group.outputs, strict=True):
                key = f"base_model.model.{layout.prefix}{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, group.inputs).to(dtype)
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK).to(dtype)
    modules = [module for group in layout.groups for module in group.modules]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    config["base_model_name_or_path"] = "SmolLM2-135M"
    return AdapterFiles(json.dumps(config).encode(), [save(tensors)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=15)
    add_option(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = choose_dtype(options.dtype, torch.device("cpu"), torch.bfloat16)
    ops = load_library(dtype, default_cache() / "operators")
    setting = (
        f"{cpu_name()}, {ops.target.name}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, "
        f"fastest of {options.repeats}, {time.strftime('%F')}"
    )
    print(f"{setting}\n")
    print("| rows | operator | µs | floor | share of the floor |\n|---:|---|---:|---:|---:|")
    shares: dict[str, dict[str, Bar]] = {}
    with torch.inference_mode():
        for rows, case in every_case(ops, options.rows):
            read, rate = read_rate(ops), product_rate(512, dtype, ops)
            walk = fastest(lambda c=case: [c.call(i) for i in range(LAYERS)], options.repeats)
            taken = walk / LAYERS
            floor = max(case.bytes / read, case.operations / rate)
            print(
                f"| {rows} | {case.name} | {1e6 * taken:.1f} | {1e6 * floor:.1f} "
                f"| {floor / taken:.2f} |"
            )
            series = {"": "copies", 1: "1 row"}.get(rows, f"{rows} rows")
            shares.setdefault(case.name, {})[series] = Bar(floor / taken)
    if options.plot:
        draw_bars(Plot(options.plot, setting), "share of the floor", shares, digits=2)


def every_case(ops: Library, rows: Iterable[int]) -> Iterator[tuple[int | str, Case]]:
    """Yield the cases of each number of rows, and then those without any."""
    yield from chain.from_iterable(((n, case) for case in cases(ops, n)) for n in rows)
    yield from (("", case) for case in copy_cases(ops))


if __name__ == "__main__":
    main()
