"""What no engine on this machine can beat: bytes over bandwidth, multiplications over their rate.

A decode step takes at least as long as reading the weights, the adapters worn and the keys and
values, and as multiplying for every row; a prompt as long as its multiplications at the best rate
there is. Attention's arithmetic, sampling, HTTP and the clients count nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.workload import MEAN_PROMPT, OUTPUT_TOKENS, Cell
from registry.home import default_cache
from serving.engine.linear import CompiledLinear
from serving.engine.ops.native.compile import NotCompiled
from serving.engine.ops.native.library import Library, load_library

RANK = 16
SIZE = 2  # bytes of a bfloat16


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of some calls, after one that does not count."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = perf_counter()
        call()
        best = min(best, perf_counter() - started)
    return best


@cache
def own_operators() -> Library | None:
    """Return the compiled operators for bfloat16, or None where nothing compiles them."""
    try:
        return load_library(torch.bfloat16, default_cache() / "operators")
    except NotCompiled:
        return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine reaches, measured now with as many threads as torch has.

    By torch or by the engine's own operators, whichever is faster: sums of torch read one place
    after the other, and some processors give more memory when it is read in several at once.
    """

    read: float  # bytes a second
    rates: dict[int, float]  # rows → bfloat16 operations a second of a product with so many rows

    @classmethod
    def measure(cls) -> "Limits":
        library = own_operators()
        read = read_rate(library)
        rates = {rows: product_rate(rows, torch.bfloat16, library) for rows in (8, 32, 512)}
        return cls(read, rates)


def read_rate(library: Library | None) -> float:
    """Return the bytes a second that a sum of torch or a product of one row reads."""
    data = torch.ones(64 << 20)
    rate = data.nbytes / fastest(data.sum, 8)
    if library:
        own = CompiledLinear(library, torch.ones(65536, 1024, dtype=library.dtype), None)
        row = torch.ones(1, own.inputs, dtype=library.dtype)
        rate = max(rate, own.weight.nbytes / fastest(lambda: own(row), 8))
    return rate


def product_rate(rows: int, dtype: torch.dtype, library: Library | None) -> float:
    """Return the operations a second of a product of so many rows, by torch or the library."""
    w, x = torch.ones(2048, 2048, dtype=dtype), torch.ones(rows, 2048, dtype=dtype)
    products = [partial(torch.nn.functional.linear, weight=w)]
    products += [CompiledLinear(library, w, None)] if library else []
    seconds = min(fastest(partial(product, x), 20) for product in products)
    return 2 * rows * w.numel() / seconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a base of the Llama family and of one adapter on its seven linears."""

    layers: int  # all linears inside layers
    head: int
    adapter: int
    kv: int  # numbers of keys and values of one token

    @classmethod
    def read(cls, folder: Path) -> "Sizes":
        config = json.loads((folder / "config.json").read_text())
        hidden, wide = config["hidden_size"], config["intermediate_size"]
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        q, kv = heads * size, config["num_key_value_heads"] * size
        shapes = [(hidden, q)] * 2 + [(hidden, kv)] * 2 + [(hidden, wide)] * 3
        return cls(
            layers * sum(a * b for a, b in shapes),
            config["vocab_size"] * hidden,
            layers * RANK * sum(a + b for a, b in shapes),
            2 * layers * kv,
        )


def floor(cell: Cell, sizes: Sizes, limits: Limits) -> float:
    """Return the output tokens a second that a closed loop of `cell.clients` cannot pass."""
    clients, worn = cell.clients, min(cell.clients, cell.adapters)
    weights = sizes.layers + sizes.head
    context = MEAN_PROMPT + OUTPUT_TOKENS / 2
    read = SIZE * (weights + worn * sizes.adapter + clients * context * sizes.kv) / limits.read
    for_each = sizes.adapter if worn else 0
    rate = limits.rates[8 if clients <= 8 else 32]
    step = max(read, 2 * clients * (weights + for_each) / rate)
    prompt = 2 * MEAN_PROMPT * (sizes.layers + for_each) / max(limits.rates.values())
    return OUTPUT_TOKENS * clients / (clients * prompt + (OUTPUT_TOKENS - 1) * step)
