"""Put an engine together: base model → weights, cache, slots, core."""

import logging
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from registry.adapter import AdapterRef
from registry.architectures import LLAMA_FAMILY
from registry.base import BaseModel
from registry.home import default_cache
from serving.engine.adapter_file import AdapterReader
from serving.engine.boundary import AdapterFiles, EngineStats, EngineUnavailable
from serving.engine.budgets import BUDGETS, SHARES
from serving.engine.compiled_model import CompiledModel, check_compilable
from serving.engine.core import EngineCore
from serving.engine.grammar import GrammarCompiler
from serving.engine.hardware import (
    choose_device,
    choose_dtype,
    ridge_tokens,
    total_memory,
)
from serving.engine.kv_cache import BLOCK, KVBlocks, KVCache, block_bytes, blocks_of
from serving.engine.linear import CompiledLinear, Linear
from serving.engine.loader import AdapterLoader, Fetch
from serving.engine.lora import HostAdapter, LoraLayout, LoraStacks
from serving.engine.memory import format_memory
from serving.engine.model import Model
from serving.engine.model_runner import Capturing, Forward, ModelRunner
from serving.engine.ops import Operators
from serving.engine.ops.attention import LENGTH_STEP
from serving.engine.ops.native.compile import NUMBERS, NotCompiled
from serving.engine.ops.native.library import Library, load_library
from serving.engine.pages import LargePages
from serving.engine.prefix_cache import PrefixCache
from serving.engine.residency import Residency
from serving.engine.sampler import Sampler
from serving.engine.scheduler import Scheduler
from serving.engine.settings import EngineSettings, option
from serving.engine.slots import BUCKETS, SlotTable, bucket_of
from serving.engine.spec import DecoderSpec, ModelSpec, check_architecture
from serving.engine.weights import read_weights, stored_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What an engine's face needs to know of its inside."""

    core: EngineCore
    grammars: GrammarCompiler
    max_model_len: int
    vocab: int
    stats: EngineStats  # of an engine that has done nothing yet


def read_model(base: BaseModel, settings: EngineSettings) -> Forward:
    """Read the base's weights onto the device. Raises EngineUnavailable with the reason."""
    kind = check_architecture(base.path)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device, stored_dtype(base.path))
    with torch.inference_mode():
        if kind in LLAMA_FAMILY:
            return _read_own(base, settings, dtype, device)
        return _read_through_transformers(base, settings, dtype, device)


def _read_own(
    base: BaseModel, settings: EngineSettings, dtype: torch.dtype, device: torch.device
) -> Forward:
    spec = ModelSpec.read(base.path)
    name, better = "torch", "Triton" if device.type == "cuda" else "C++"
    if settings.operators == "auto":
        try:
            if device.type == "cuda":
                length = _max_model_len(spec, settings, dtype, device, paged=True)
                return _triton_model(base, spec, dtype, device, length)
            check_compilable(spec)
            library = _library(dtype)
            length = _max_model_len(spec, settings, dtype, device)
            make = partial(CompiledLinear, library, pages=LargePages())
            weights = read_weights(base.path, spec, dtype, device, make)
            return CompiledModel(spec, weights, library, length)
        except NotCompiled as error:
            logger.warning("torch computes, several times slower than %s: %s", better, error)
            name = f"torch ({error})"
    length = _max_model_len(spec, settings, dtype, device)
    weights = read_weights(base.path, spec, dtype, device, Linear)
    return Model(spec, weights, Operators(), length, name)


def _triton_model(
    base: BaseModel, spec: ModelSpec, dtype: torch.dtype, device: torch.device, length: int
) -> Forward:
    if find_spec("triton") is None:
        raise NotCompiled("the package triton is not installed")
    from serving.engine.triton_model import TritonModel  # it imports triton

    return TritonModel(spec, read_weights(base.path, spec, dtype, device, Linear), length)


def _read_through_transformers(
    base: BaseModel, settings: EngineSettings, dtype: torch.dtype, device: torch.device
) -> Forward:
    # They import for seconds what bases of the Llama family do without.
    from serving.engine.transformers_model import TransformersModel, TransformersSpec
    from serving.engine.transformers_network import MakeProduct, Network

    library, name = None, "torch"
    make: MakeProduct = Linear
    if device.type == "cpu" and settings.operators == "auto":
        try:
            library = _library(dtype)
            make = partial(CompiledLinear, library, pages=LargePages())
            name = f"C++ ({library.target.name})"
        except NotCompiled as error:
            logger.warning("torch computes, several times slower than C++: %s", error)
            name = f"torch ({error})"
    network = Network.read(base.path, dtype, device, make)
    spec = TransformersSpec.measure(base.path, network)
    length = _max_model_len(spec, settings, dtype, device)
    return TransformersModel(spec, network, length, library, name)


def _library(dtype: torch.dtype) -> Library:
    """Return the compiled operators. Raises NotCompiled where there are none."""
    if dtype not in NUMBERS:
        raise NotCompiled(f"the C++ operators compute float32 and bfloat16, not {dtype}")
    return load_library(dtype, default_cache() / "operators")


def assemble(model: Forward, fetch: Fetch, settings: EngineSettings) -> Parts:
    """Build everything around a model that can be run."""
    spec, dtype, device = model.spec, model.dtype, model.device
    layout = LoraLayout(spec.layers, spec.groups, spec.prefix, model.library is not None)
    table = _slot_table(layout, settings, dtype, device)
    stacks = LoraStacks(layout, table.pages, dtype, device)
    cache = _kv_cache(model, settings)
    blocks = KVBlocks(spec, _prefix_blocks(spec, settings, dtype, device), dtype, device)
    highest = min(settings.max_lora_rank, table.highest)
    if isinstance(model, Capturing):
        model.capture(cache, stacks, settings.max_running, settings.max_batched_tokens)

    reader = AdapterReader(layout, dtype, highest, model.base_layers, model.library)

    # What reading computes with the base neither waits for steps nor comes between two of them.
    beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        if beside is None:
            return reader.read(source, ref)
        with torch.cuda.stream(beside):
            return reader.read(source, ref).pinned()

    loader = AdapterLoader(
        fetch,
        read,
        reader.measure,
        budget=_host_memory(settings, device),
        room=_loading_memory(settings),
    )
    core = EngineCore(
        Scheduler(
            settings.max_running,
            settings.kv_slots - settings.max_running,
            settings.max_batched_tokens,
            ridge_tokens(device, model.library is not None and model.library.matrices),
        ),
        cache,
        Residency(table, stacks, loader, _copy_bytes(spec, dtype, device)),
        ModelRunner(model, cache, table, stacks),
        Sampler(model.greedy, spec.eos_ids, model.sample),
        PrefixCache(cache, blocks),
    )
    grammars = GrammarCompiler(spec.folder, spec.vocab, spec.eos_ids)
    blank = _blank_stats(settings, model, core)
    return Parts(core, grammars, model.length, spec.vocab, blank)


def _slot_table(
    layout: LoraLayout, settings: EngineSettings, dtype: torch.dtype, device: torch.device
) -> SlotTable:
    """Divide the adapter memory into pages. Raises EngineUnavailable when it holds none."""
    budget = settings.adapter_memory or total_memory(device) // SHARES["adapter_memory"]
    sizes = {bucket: layout.size(bucket) * dtype.itemsize for bucket in BUCKETS}
    lowest = sizes[BUCKETS[0]]
    if budget < lowest:
        raise EngineUnavailable(
            f"{_adapter_memory(settings, budget)}: an adapter of the lowest rank, {BUCKETS[0]}, "
            f"takes {lowest} bytes on this base. {_more_for_adapters(settings, lowest)}"
        )
    wanted = bucket_of(settings.max_lora_rank)
    highest = max(bucket for bucket in BUCKETS if bucket <= wanted and sizes[bucket] <= budget)
    if highest < wanted:
        logger.warning(
            "adapters above rank %d will be refused: one takes %d bytes, and %s. %s",
            *(highest, sizes[wanted], _adapter_memory(settings, budget)),
            _more_for_adapters(settings, sizes[wanted]),
        )
    return SlotTable(budget // lowest, highest, settings.adapter_slots)


def _adapter_memory(settings: EngineSettings, budget: int) -> str:
    if settings.is_given("adapter_memory"):
        return f"--adapter-memory={budget}"
    share = f"1/{SHARES['adapter_memory']} of what is left"
    return f"--adapter-memory is not given, and its share, {share}, is {budget} bytes"


def _more_for_adapters(settings: EngineSettings, least: int) -> str:
    """Say what to do; shares grow when those that were given are less."""
    given = [name for name in BUDGETS if name != "adapter_memory" and settings.is_given(name)]
    lower = f" Lower {', '.join(map(option, given))} if that is too much." if given else ""
    return f"Give --adapter-memory={format_memory(least)} or more.{lower}"


def _copy_bytes(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> int:
    """Return the bytes that are copied in about the time of a step, which reads all weights.

    On a CPU memory that was never written takes five times as long as what is read
    (docs/tuning.md). To a GPU it is arithmetic: PCIe 5 over the memory of an H100.
    """
    linears = sum(group.inputs * sum(group.outputs) for group in spec.groups)
    share = 64 if device.type == "cuda" else 8
    return max(1 << 20, spec.layers * linears * dtype.itemsize // share)


def _host_memory(settings: EngineSettings, device: torch.device) -> int:
    if settings.adapter_host_memory is not None:
        return settings.adapter_host_memory
    return 0 if device.type == "cpu" else total_memory(torch.device("cpu")) // 8


def _loading_memory(settings: EngineSettings) -> int:
    """Return the bytes of adapters on their way; beside a GPU it is the host's memory."""
    share = total_memory(torch.device("cpu")) // SHARES["loading_memory"]
    return settings.loading_memory or share


def _max_model_len(
    spec: DecoderSpec,
    settings: EngineSettings,
    dtype: torch.dtype,
    device: torch.device,
    *,
    paged: bool = False,
) -> int:
    """Return the tokens of one sequence: it must be able to reach them when it is alone.

    On a GPU without pages every sequence has the memory for them from the start.
    """
    sharing = 1 if paged or device.type == "cpu" else settings.kv_slots
    budget = _kv_bytes(settings, device)
    fits = budget // sharing // block_bytes(spec, dtype) * BLOCK
    wanted = settings.max_model_len
    if wanted is None:
        wanted = min(spec.context, max(1, fits // LENGTH_STEP) * LENGTH_STEP)
    if not 0 < wanted <= min(spec.context, fits):
        whom = "one sequence" if sharing == 1 else f"each of {sharing} sequences"
        lower = "--max-model-len" if sharing == 1 else "--max-model-len or --max-running"
        raise EngineUnavailable(
            f"--max-model-len={wanted}: the base was made for {spec.context} tokens, and "
            f"--kv-cache-memory={budget} holds {fits} tokens of {whom}. Lower {lower}, or raise "
            "--kv-cache-memory."
        )
    return wanted


def _kv_bytes(settings: EngineSettings, device: torch.device) -> int:
    return settings.kv_cache_bytes or total_memory(device) // SHARES["kv_cache_bytes"]


def _kv_cache(model: Forward, settings: EngineSettings) -> KVCache:
    """Return a cache as large as all sequences can get, or as the budget allows."""
    budget = _kv_bytes(settings, model.device)
    whole = blocks_of(model.length)
    fits = max(whole, budget // block_bytes(model.spec, model.dtype))
    try:
        return model.kv_cache(settings.kv_slots, min(fits, whole * settings.kv_slots))
    except OSError as error:  # this Linux gives no more addresses than it has memory
        raise EngineUnavailable(
            f"--max-model-len={model.length} for {settings.kv_slots} sequences is more memory than "
            f"the system lets a process ask for ({error}). Lower --max-model-len or --max-running, "
            "or set vm.overcommit_memory to 0."
        ) from error


def _prefix_blocks(
    spec: DecoderSpec, settings: EngineSettings, dtype: torch.dtype, device: torch.device
) -> int:
    """Return how many blocks the prefix cache has. Raises EngineUnavailable for a wrong bound."""
    size, memory = block_bytes(spec, dtype), total_memory(device)
    budget = settings.prefix_cache_bytes
    if budget is None:
        budget = memory // SHARES["prefix_cache_bytes"]
    elif 0 < budget < size or budget > memory:
        raise EngineUnavailable(
            f"--prefix-cache-memory={budget}: {BLOCK} tokens take {size} bytes of this base, and "
            f"{device} has {memory}. Take something between, or 0 for no prefix cache."
        )
    return budget // size


def _blank_stats(settings: EngineSettings, model: Forward, core: EngineCore) -> EngineStats:
    residency = core.residency
    return EngineStats(
        running=0,
        waiting=0,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        kv_tokens_used=0,
        kv_tokens_total=core.cache.blocks * BLOCK,
        kv_block_tokens=BLOCK,
        prefix_asked=0,
        prefix_found=0,
        prefix_bytes=0,
        prefix_bytes_total=core.prefixes.capacity_bytes,
        adapter_slots=residency.table.most,
        adapter_memory=residency.table.pages * residency.stacks.page_bytes,
        adapter_memory_used=0,
        resident=(),
        loading=(),
        in_memory=0,
        steps=0,
        prompt_tokens=0,
        generated_tokens=0,
        aborted=0,
        failed=0,
        paused=0,
        adapter_loads=0,
        adapter_evictions=0,
        load_stages=(),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        operators=model.operators,
    )
