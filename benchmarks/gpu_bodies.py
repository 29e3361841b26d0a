"""Who computes the steps of `benchmarks.gpu`: this engine with Triton, and PEFT."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import NoReturn, Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.engine_step import decoding, random_weights, reading
from benchmarks.gpu import RANKS, Cell, Part, Sizes
from registry.adapter import AdapterRef
from serving.engine.build import assemble
from serving.engine.device_step import DeviceStep
from serving.engine.hardware import total_memory
from serving.engine.linear import Linear
from serving.engine.lora import HostAdapter, LoraLayout
from serving.engine.sequence import Row
from serving.engine.settings import EngineSettings
from serving.engine.slots import bucket_of
from serving.engine.spec import ModelSpec
from serving.engine.step_graphs import StepGraphs
from serving.engine.triton_model import TritonModel
from serving.engine.vector_file import FileVectors
from serving.engine.vectors import Vectors

Step = Callable[[], object]  # ends when its tokens are on the host
PROMPTS_RUNNING = 32  # sequences that there is room for when one prompt is read, the default


def _spec(vocab: int, layers: int, hidden: int, heads: int, dim: int, wide: int) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        vocab=vocab,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads // 4,
        head_dim=dim,
        intermediate=wide,
        eps=1e-5,
        context=8192,
        windows=(None,) * layers,
        inverse_frequencies=tuple(500000.0 ** (-2 * i / dim) for i in range(dim // 2)),
        head_norm=False,
        tied=True,  # as small bases are; an untied head is the same bytes a step
        eos_ids=frozenset({2}),
    )


SPECS = {
    "tiny": _spec(256, 2, 32, 4, 8, 48),
    "1b": _spec(128256, 16, 2048, 32, 64, 8192),  # Llama 3.2 1B
    "8b": _spec(128256, 32, 4096, 32, 128, 14336),  # Llama 3.1 8B
}


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a sum over a large tensor reads."""
    data = torch.ones((1 << 30) if device.type == "cuda" else (4 << 20), device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


class Steps(Protocol):
    """A body with weights on the device."""

    def step(self, cell: Cell) -> tuple[Step, int]:
        """Return a cell's step, and the bytes that it must read."""
        ...


class Wardrobe:
    """The engine around a Triton model of random weights."""

    def __init__(
        self, shape: str, context: int, length: int, running: int, device: torch.device
    ) -> None:
        self.spec, self.context = SPECS[shape], context
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with torch.inference_mode():
            weights = random_weights(self.spec, self.dtype, device, Linear)
            self.model = TritonModel(self.spec, weights, length)
            self.settings = EngineSettings(
                max_running=running,
                max_lora_rank=max(RANKS),
                prefix_cache_bytes=0,
                adapter_memory=_adapter_memory(self.spec, self.dtype, device, running),
            )
            self.core = assemble(self.model, _no_fetch, self.settings).core
        self.captured = self.model.graphs
        self.nothing = StepGraphs(_not_captured, (), device)
        self.refs: list[AdapterRef] = []
        self.kind = 0, False  # rank, and whether there are vectors

    @torch.inference_mode()
    def step(self, cell: Cell) -> tuple[Step, int]:
        layout = LoraLayout(self.spec.layers, self.spec.groups)
        self._wear(cell, layout)
        self.model.graphs = self.nothing if cell.body == "launched" else self.captured
        parts = self._reading(cell) if cell.prompt else self._decoding(cell)
        for row in chain.from_iterable(parts):
            if not self.core.cache.reserve(row.sequence.kv_slot, row.stop):
                raise torch.OutOfMemoryError(f"no room for the keys of {cell.batch} rows")
        runner, sampler = self.core.runner, self.core.sampler

        @torch.inference_mode()
        def step() -> None:
            for rows in parts[:-1]:
                runner.run(rows)
            sampler.choose(*runner.run(parts[-1]))

        numbers = _parameters(self.spec) + cell.adapters * layout.size(bucket_of(cell.rank or 1))
        kept = cell.batch * self.context * self.spec.kv_bytes_per_token(self.dtype)
        return step, numbers * self.dtype.itemsize + kept

    def _decoding(self, cell: Cell) -> list[list[Row]]:
        rows = decoding(self.refs, cell.batch, cell.adapters, self.context, self.spec.vocab)
        return [rows]

    def _reading(self, cell: Cell) -> list[list[Row]]:
        """Return a prompt as the scheduler cuts it for a sequence that is alone."""
        (row,) = reading(cell.prompt, self.refs[0] if cell.adapters else None, self.spec.vocab)
        most = self.settings.max_batched_tokens
        starts = range(0, cell.prompt, most)
        return [[Row(row.sequence, at, min(most, cell.prompt - at))] for at in starts]

    def _wear(self, cell: Cell, layout: LoraLayout) -> None:
        """Fill slots with the same random adapter: it is read as often as different ones are."""
        residency, kind = self.core.residency, (cell.rank, cell.body == "dressed")
        if kind != self.kind:
            for ref in self.refs:
                residency.table.evict(ref.digest)
            self.refs, self.kind = [], kind
        if cell.adapters <= len(self.refs):
            return
        bucket = bucket_of(cell.rank)
        if cell.adapters > residency.table.rows(bucket):
            raise torch.OutOfMemoryError(f"{cell.adapters} adapters of rank {cell.rank} do not fit")
        made = HostAdapter("", bucket, torch.randn(layout.size(bucket)).mul(0.02).to(self.dtype))
        made = _with_vectors(made, random_vectors(self.spec, self.dtype)) if kind[1] else made
        for index in range(len(self.refs), cell.adapters):
            adapter = replace(made, digest=f"{cell.rank:031x}{kind[1]:x}{index:032x}")
            place = residency.table.choices(bucket, residency.stacks.more_pages(adapter))[0]
            if place.leaving:
                raise torch.OutOfMemoryError(f"{cell.adapters} adapters with vectors do not fit")
            residency.table.place(adapter.digest, place.slot)
            self.refs.append(AdapterRef(adapter.digest, f"random/r{cell.rank}-{index}@v1"))
            residency.stacks.load(place.slot, adapter)


def random_vectors(spec: ModelSpec, dtype: torch.dtype) -> Vectors:
    """Return a scale and a shift after every linear, near 1 and 0, and norms."""
    widths = {group.name: sum(group.outputs) for group in spec.groups}
    outputs = {
        name: (1 + 0.02 * torch.randn(spec.layers, width), 0.02 * torch.randn(spec.layers, width))
        for name, width in widths.items()
    }
    norms = 1 + 0.02 * torch.randn(2 * spec.layers + 1, spec.hidden)
    return Vectors(outputs, norms.to(dtype), None, None, None, 0)


def _with_vectors(adapter: HostAdapter, vectors: Vectors) -> HostAdapter:
    """Return a LoRA with vectors behind it."""
    numbers = vectors.size_bytes // adapter.weights.itemsize
    whole = torch.cat((adapter.weights, adapter.weights.new_zeros(numbers)))
    laid = FileVectors(vectors, None, None).write(whole[-numbers:])
    return replace(adapter, weights=whole, vectors=laid)


class Peft:
    """PEFT over transformers: `adapter_names` for a mixed batch, as its documentation has it."""

    def __init__(self, shape: str, context: int, device: torch.device) -> None:
        self.spec, self.context, self.device = SPECS[shape], context, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        spec = self.spec
        config = LlamaConfig(
            vocab_size=spec.vocab,
            hidden_size=spec.hidden,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            intermediate_size=spec.intermediate,
            max_position_embeddings=spec.context,
            tie_word_embeddings=spec.tied,
        )
        with device:
            self.base = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        self.peft: PeftModel | None = None
        self.names: list[str] = []

    def step(self, cell: Cell) -> tuple[Step, int]:
        """Cells without adapters come first: PEFT's wrappers would cost them time, too."""
        self._wear(cell.adapters, cell.rank)
        model, more = self.peft or self.base, {}
        if cell.adapters > 1:
            more["adapter_names"] = [self.names[i % cell.adapters] for i in range(cell.batch)]
        cache = DynamicCache()
        kept, read = (0, cell.prompt) if cell.prompt else (self.context, 1)
        shape = (cell.batch, self.spec.kv_heads, kept, self.spec.head_dim)
        for layer in range(self.spec.layers):
            half = torch.zeros(shape, dtype=self.dtype, device=self.device)
            cache.update(half, half.clone(), layer)
        ids = torch.ones(cell.batch, read, dtype=torch.int64, device=self.device)
        more |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}

        @torch.inference_mode()
        def step() -> None:
            logits = model(input_ids=ids, **more).logits
            logits[:, -1].argmax(-1).tolist()
            cache.crop(-read)

        return step, 0

    def _wear(self, adapters: int, rank: int) -> None:
        for index in range(len(self.names), adapters):
            self._add(f"a{index}", rank)
            self.names.append(f"a{index}")

    def _add(self, name: str, rank: int) -> None:
        """Add an adapter; from the second on a copy of the first, beside it.

        PEFT's own way takes the longer the more adapters there are, minutes for 128 of them.
        """
        if self.peft is None:
            config = LoraConfig(
                r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            )
            with self.device:
                made = get_peft_model(self.base, config, name, autocast_adapter_dtype=False)
            assert isinstance(made, PeftModel)
            self.peft = made.eval()
            return
        for layer in self.peft.modules():
            if isinstance(layer, LoraLayer):
                for part in (*layer.adapter_layer_names, *layer.other_param_names):
                    held = getattr(layer, part)
                    if self.names[0] in held:
                        held[name] = deepcopy(held[self.names[0]])


def body_of(shape: str, part: Part, context: int, device: torch.device) -> Steps:
    """Return who computes a part, with memory for what it measures."""
    if part == "peft":
        return Peft(shape, context, device)
    sizes = Sizes.of(shape)
    if part == "prompts":
        return Wardrobe(shape, 0, max(sizes.prompts) + 64, PROMPTS_RUNNING, device)
    return Wardrobe(shape, context, context + 64, max(sizes.batches), device)


def _adapter_memory(spec: ModelSpec, dtype: torch.dtype, device: torch.device, most: int) -> int:
    """Return the bytes of as many adapters as are worn at once, or of those that fit."""
    wanted = most * LoraLayout(spec.layers, spec.groups).size(max(RANKS)) * dtype.itemsize
    return min(wanted, total_memory(device) * 3 // 4)


def _parameters(spec: ModelSpec) -> int:
    """Return the numbers of the weights that a step reads: the head, and all layers' linears."""
    linears = sum(group.inputs * sum(group.outputs) for group in spec.groups)
    return spec.vocab * spec.hidden + spec.layers * linears


def _not_captured(_: DeviceStep) -> NoReturn:
    raise AssertionError("there is nothing to capture")


def _no_fetch(ref: AdapterRef) -> NoReturn:
    raise AssertionError(f"{ref.label} is loaded already")
