"""Milliseconds of one decode step, torch beside C++, on random weights of a real size.

    python -m benchmarks.engine_step [--dtype bfloat16] [--batch 1 8 32] [--adapters 0 1 8 32]

The shape is SmolLM2-135M's; adapters have rank 16 on all seven linears. Every row has
`--context` tokens behind it. Both bodies run in turn, step by step, so that another load on the
machine meets both: the ratio of the medians is to be trusted before the milliseconds. The last
lines are the time of reading one prompt of 128 tokens and one chunk of 512.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import torch

from registry.adapter import AdapterRef
from registry.home import default_cache
from serving.engine.boundary import GenerateRequest, SamplingParams
from serving.engine.build import Parts, assemble
from serving.engine.compiled_model import CompiledModel
from serving.engine.hardware import choose_device, choose_dtype
from serving.engine.linear import CompiledLinear, Linear
from serving.engine.lora import HostAdapter
from serving.engine.model import Model
from serving.engine.model_runner import Forward
from serving.engine.ops import Operators
from serving.engine.ops.native.library import load_library
from serving.engine.pages import LargePages
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from serving.engine.slots import bucket_of
from serving.engine.spec import ModelSpec
from serving.engine.weights import L, LayerWeights, MakeLinear, ModelWeights

RANK = 16
LENGTH = 1024  # tokens of a KV slot
SMOLLM2_135M = ModelSpec(
    architecture="llama",
    vocab=49152,
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    eps=1e-5,
    context=8192,
    windows=(None,) * 30,
    inverse_frequencies=tuple(100000.0 ** (-i / 32) for i in range(32)),
    head_norm=False,
    tied=True,
    eos_ids=frozenset({2}),
)


def random_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, linear: MakeLinear[L]
) -> ModelWeights[L]:
    """Return the same weights whatever the kind of linear."""
    generator = torch.Generator(device).manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * shape[-1] ** -0.5
        return values.to(dtype)

    ones = torch.ones(spec.hidden, dtype=dtype, device=device)
    layers = tuple(
        LayerWeights(
            ones,
            ones,
            None,
            None,
            {g.name: linear(weight(sum(g.outputs), g.inputs), None) for g in spec.groups},
        )
        for _ in range(spec.layers)
    )
    embedding = weight(spec.vocab, spec.hidden)
    return ModelWeights(embedding, layers, ones, linear(embedding, None))


def bodies(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> list[Forward]:
    """Return the torch model and, on a CPU that can, the compiled one."""
    torch_model = Model(spec, random_weights(spec, dtype, device, Linear), Operators(), LENGTH)
    if device.type != "cpu":
        return [torch_model]
    library = load_library(dtype, default_cache() / "operators")
    make = partial(CompiledLinear, library, pages=LargePages())
    weights = random_weights(spec, dtype, device, make)
    return [torch_model, CompiledModel(spec, weights, library, LENGTH)]


def load_adapters(parts: Parts, count: int, dtype: torch.dtype) -> list[AdapterRef]:
    """Put random adapters into the slots; returns how to name them, and prints the load time."""
    residency = parts.core.residency
    layout = residency.stacks.layout
    refs: list[AdapterRef] = []
    seconds: list[float] = []
    size = 0
    for index in range(count):
        weights = torch.randn(layout.size(bucket_of(RANK))).mul(0.02).to(dtype)
        adapter = HostAdapter(f"{index:064x}", bucket_of(RANK), weights)
        size = adapter.size_bytes
        slot = residency.table.choices(adapter.bucket)[0].slot
        residency.table.place(adapter.digest, slot)
        started = time.perf_counter()
        residency.stacks.load(slot, adapter)
        seconds.append(time.perf_counter() - started)
        refs.append(AdapterRef(adapter.digest, f"random/{index}@v1"))
    print(
        f"slot load of rank {RANK}: {1e3 * statistics.median(seconds):.1f} ms, {size / 1e6:.1f} MB"
    )
    return refs


def decoding(
    refs: Sequence[AdapterRef], batch: int, adapters: int, context: int, vocab: int
) -> list[Row]:
    """Return rows that read token number `context` of `batch` sequences."""
    rows = []
    for index in range(batch):
        ref = refs[index % adapters] if adapters else None
        prompt = tuple((7 * index + j) % vocab for j in range(context + 1))
        request = Request(GenerateRequest(str(index), prompt, SamplingParams(temperature=0), ref))
        request.kv_slot, request.computed = index, context
        rows.append(Row(request, context, 1))
    return rows


def reading(tokens: int, ref: AdapterRef | None, vocab: int) -> list[Row]:
    prompt = tuple(j % vocab for j in range(tokens))
    request = Request(GenerateRequest("p", prompt, SamplingParams(temperature=0), ref))
    request.kv_slot = 0
    return [Row(request, 0, tokens)]


def measure(engines: Sequence[Parts], rows: Sequence[Row], steps: int) -> str:
    """Return the medians of each engine and how many times faster the last one is."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(steps + 3):
        for parts, taken in zip(engines, times, strict=True):
            started = time.perf_counter()
            logits, sequences = parts.core.runner.run(rows)
            parts.core.sampler.choose(logits, sequences)
            taken.append(1e3 * (time.perf_counter() - started))
    medians = [statistics.median(taken[3:]) for taken in times]
    columns = [f"{median:8.2f} {min(t[3:]):8.2f}" for median, t in zip(medians, times, strict=True)]
    return " ".join(columns) + f"   {medians[0] / medians[-1]:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec, device = SMOLLM2_135M, choose_device(options.device)
    dtype = choose_dtype(options.dtype, device, torch.bfloat16)
    with torch.inference_mode():
        models = bodies(spec, dtype, device)
        engines = [assemble(model, no_fetch, EngineSettings()) for model in models]
        most = max(1, *options.adapters)
        named = [load_adapters(parts, most, dtype) for parts in engines]
        print(f"{device} {dtype} threads={torch.get_num_threads()} context={options.context}")
        print(
            "columns: median and minimum, ms, of " + ", then of ".join(m.operators for m in models)
        )
        print("batch adapters  " + "  median      min " * len(models) + "  ratio")
        for batch in options.batch:
            for adapters in options.adapters:
                if adapters <= batch:
                    rows = decoding(named[0], batch, adapters, options.context, spec.vocab)
                    print(f"{batch:5} {adapters:8} {measure(engines, rows, options.steps)}")
        for tokens in (128, 512):
            for ref in (None, named[0][0]):
                steps = max(3, options.steps // 4)
                result = measure(engines, reading(tokens, ref, spec.vocab), steps)
                print(f"prompt of {tokens}, {'one adapter' if ref else 'base':11} {result}")


def no_fetch(ref: AdapterRef) -> NoReturn:
    raise AssertionError(f"{ref.label} is loaded already")


if __name__ == "__main__":
    main()
