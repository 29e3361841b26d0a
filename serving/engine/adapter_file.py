"""PEFT files → a HostAdapter: the last check before weights of a stranger are computed with."""

from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from registry.adapter import AdapterRef
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.errors import WardrobeError
from registry.jsonfile import check_size, parse_object
from registry.lora import AdapterConfig
from registry.parts import Parts, sort_parts
from registry.vectors import AnyConfig, parse_config
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed
from serving.engine.lora import HostAdapter, LoraLayout, Unfit
from serving.engine.slots import bucket_of
from serving.engine.spec import LinearGroup
from serving.engine.vector_file import BaseLayers, read_vectors

MAX_CONFIG_BYTES = 1 << 20

Pair = tuple[torch.Tensor, torch.Tensor]  # A and B as the file has them


def read_adapter(
    source: Path | AdapterFiles,
    ref: AdapterRef,
    layout: LoraLayout,
    dtype: torch.dtype,
    max_rank: int,
    base: BaseLayers | None = None,
) -> HostAdapter:
    """Read and convert one adapter, from its folder or from memory.

    Raises AdapterLoadFailed, and nothing else for bad files.
    Without `base` it may be nothing but LoRA.
    """
    try:
        files = _read_files(source) if isinstance(source, Path) else source
        config = parse_config(parse_object(files.config, CONFIG_NAME))
        tensors = load(b"".join(files.weights))
    except (WardrobeError, SafetensorError, OSError) as error:
        raise AdapterLoadFailed(f"{ref.label} cannot be loaded: {error}") from error
    try:
        parts = _sorted(tensors)
        weights, bucket = _low_rank(config, parts, layout, dtype, max_rank)
        vectors = read_vectors(config, parts, layout, base, dtype)
    except Unfit as fault:
        raise AdapterLoadFailed(f"{ref.label} cannot be worn: {fault}") from fault
    return HostAdapter.of(ref.digest, bucket, weights, vectors)


def _read_files(folder: Path) -> AdapterFiles:
    config = folder / CONFIG_NAME
    check_size(config, MAX_CONFIG_BYTES)
    return AdapterFiles(config.read_bytes(), [(folder / WEIGHTS_NAME).read_bytes()])


def _low_rank(
    config: AnyConfig,
    parts: Parts[torch.Tensor],
    layout: LoraLayout,
    dtype: torch.dtype,
    max_rank: int,
) -> tuple[torch.Tensor, int]:
    """Return A and B of all modules in one piece, zero for vectors only, and their bucket."""
    pairs = {module: (own["A"], own["B"]) for module, own in parts.items() if "A" in own}
    rank = max((a.shape[0] for a, _ in pairs.values()), default=1)
    if rank > max_rank:
        raise Unfit(f"its rank is {rank}, the engine's highest is {max_rank}.")
    bucket = bucket_of(rank)
    weights = torch.zeros(layout.size(bucket), dtype=dtype)
    stacks = layout.stacks(weights, bucket)
    groups = {name: tuple(half[:, 0] for half in halves) for name, halves in stacks.items()}
    alike: dict[tuple[LinearGroup, int, int, float], list[tuple[int, Pair]]] = defaultdict(list)
    for module, pair in sorted(pairs.items()):
        assert isinstance(config, AdapterConfig)  # no other has A and B
        group, part, layer = layout.place(module)
        rank = config.rank(module)
        _check_shapes(module, *pair, rank, group, part)
        alike[group, part, rank, config.scale(module)].append((layer, pair))
    for (group, part, _, scale), found in alike.items():  # layers at once: calls take most time
        layers, pairs = zip(*sorted(found, key=itemgetter(0)), strict=True)
        a, b = (torch.stack(halves) for halves in zip(*pairs, strict=True))
        layout.write(groups[group.name], (group, part), layers, a, b, scale)
    if not weights.sum().isfinite():  # or only the sum is too large, which the next look tells
        for name, halves in groups.items():
            if not all(tensor.isfinite().all() for tensor in halves):
                raise Unfit(f"a weight of {name} is not a finite number in {dtype}.")
    return weights, bucket


def _sorted(tensors: dict[str, torch.Tensor]) -> Parts[torch.Tensor]:
    """Return module → part → tensor; a module that has one of A and B must have both."""
    parts = sort_parts(tensors)
    known = {id(tensor) for own in parts.values() for tensor in own.values()}
    if strange := sorted(name for name, tensor in tensors.items() if id(tensor) not in known):
        raise Unfit(f"the tensor {strange[0]!r} is nothing that an adapter has.")
    if halved := sorted(m for m, own in parts.items() if ("A" in own) != ("B" in own)):
        raise Unfit(f"{halved[0]} has only one of lora_A and lora_B.")
    if not parts:
        raise Unfit("adapter_model.safetensors holds no tensors.")
    return parts


def _check_shapes(
    module: str, a: torch.Tensor, b: torch.Tensor, rank: int, group: LinearGroup, part: int
) -> None:
    wanted = ((rank, group.inputs), (group.outputs[part], rank))
    found = (tuple(a.shape), tuple(b.shape))
    if found != wanted:
        raise Unfit(f"{module}: A and B have shapes {found}, the base and config want {wanted}.")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise Unfit(f"{module}: {a.dtype} and {b.dtype} are not floating point.")
