"""PEFT files → a HostAdapter: the last check before weights of a stranger are computed with."""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from registry.adapter import AdapterRef
from registry.errors import WardrobeError
from registry.jsonfile import read_object
from registry.lora import AdapterConfig, lora_modules
from serving.engine.boundary import AdapterLoadFailed
from serving.engine.lora import HostAdapter, LoraLayout, write_modules
from serving.engine.slots import bucket_of
from serving.engine.spec import LinearGroup

MAX_CONFIG_BYTES = 1 << 20

Pair = tuple[torch.Tensor, torch.Tensor]  # A and B as the file has them


def read_adapter(
    folder: Path, ref: AdapterRef, layout: LoraLayout, dtype: torch.dtype, max_rank: int
) -> HostAdapter:
    """Read and convert one adapter. Raises AdapterLoadFailed, and nothing else for bad files."""
    try:
        config = AdapterConfig.parse(read_object(folder / "adapter_config.json", MAX_CONFIG_BYTES))
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
    except (WardrobeError, SafetensorError, OSError) as error:
        raise AdapterLoadFailed(f"{ref.label} cannot be loaded: {error}") from error
    try:
        return _convert(config, tensors, ref, layout, dtype, max_rank)
    except _Unfit as fault:
        raise AdapterLoadFailed(f"{ref.label} cannot be worn: {fault}") from fault


class _Unfit(Exception):
    """Why this adapter does not fit this model."""


def _convert(
    config: AdapterConfig,
    tensors: dict[str, torch.Tensor],
    ref: AdapterRef,
    layout: LoraLayout,
    dtype: torch.dtype,
    max_rank: int,
) -> HostAdapter:
    modules = _modules(tensors)
    rank = max(tensors[_key(module, "A")].shape[0] for module in modules)
    if rank > max_rank:
        raise _Unfit(f"its rank is {rank}, the engine's highest is {max_rank}.")
    bucket = bucket_of(rank)
    weights = torch.zeros(layout.size(bucket), dtype=dtype)
    stacks = layout.stacks(weights, bucket)
    groups = {name: tuple(half[:, 0] for half in halves) for name, halves in stacks.items()}
    alike: dict[tuple[str, int, int, float], list[tuple[int, Pair]]] = defaultdict(list)
    for module in modules:
        group, part, layer = _place(module, layout)
        pair = tensors[_key(module, "A")], tensors[_key(module, "B")]
        rank = config.rank(module)
        _check_shapes(module, *pair, rank, group, part)
        alike[group.name, part, rank, config.scale(module)].append((layer, pair))
    for (name, part, _, scale), found in alike.items():  # layers at once: calls take most time
        layers, pairs = zip(*found, strict=True)
        a, b = (torch.stack(halves) for halves in zip(*pairs, strict=True))
        write_modules(groups[name], part, layers, a, b.float() * scale)
    if not weights.sum().isfinite():  # or only the sum is too large, which the next look tells
        for name, halves in groups.items():
            if not all(tensor.isfinite().all() for tensor in halves):
                raise _Unfit(f"a weight of {name} is not a finite number in {dtype}.")
    return HostAdapter(ref.digest, bucket, weights)


def _modules(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the modules, each of which must have A and B and nothing else."""
    modules = lora_modules(tensors)
    known = {_key(module, half) for module, halves in modules.items() for half in halves}
    if strange := sorted(tensors.keys() - known):
        raise _Unfit(f"the tensor {strange[0]!r} is not LoRA A or B of a module.")
    if halved := sorted(module for module, halves in modules.items() if len(halves) != 2):
        raise _Unfit(f"{halved[0]} has only one of lora_A and lora_B.")
    if not modules:
        raise _Unfit("adapter_model.safetensors holds no LoRA tensors.")
    return sorted(modules)


def _key(module: str, half: str) -> str:
    return f"base_model.model.{module}.lora_{half}.weight"


def _place(module: str, layout: LoraLayout) -> tuple[LinearGroup, int, int]:
    """Return group, place in it and layer of `model.layers.N.MODULE`, or as the base names it."""
    head, _, rest = module.removeprefix(layout.prefix).partition(".")
    found = layout.find(rest) if head.isdecimal() and int(head) < layout.layers else None
    if found is None or module != f"{layout.prefix}{head}.{rest}":
        raise _Unfit(f"{module} is not a linear layer that this base model can adapt.")
    return *found, int(head)


def _check_shapes(
    module: str, a: torch.Tensor, b: torch.Tensor, rank: int, group: LinearGroup, part: int
) -> None:
    wanted = ((rank, group.inputs), (group.outputs[part], rank))
    found = (tuple(a.shape), tuple(b.shape))
    if found != wanted:
        raise _Unfit(f"{module}: A and B have shapes {found}, the base and config want {wanted}.")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise _Unfit(f"{module}: {a.dtype} and {b.dtype} are not floating point.")
