"""PEFT files → a HostAdapter: the last check before weights of a stranger are computed with."""

import ctypes
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from registry.adapter import AdapterRef
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.errors import WardrobeError
from registry.jsonfile import check_size, parse_object
from registry.lora import AdapterConfig
from registry.parts import Parts, sort_parts
from registry.tensors import ADAPTER_BOUNDS, Tensor, header_in, header_of, parse_header
from registry.vectors import AnyConfig, parse_config
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed
from serving.engine.lora import HostAdapter, LoraLayout, Unfit, panel_offset
from serving.engine.ops.native.layout import FORMATS, FileTensorC
from serving.engine.ops.native.library import Library
from serving.engine.pages import SpareMemory
from serving.engine.slots import bucket_of
from serving.engine.spec import LinearGroup
from serving.engine.vector_file import BaseLayers, FileVectors, most_bytes, read_vectors

MAX_CONFIG_BYTES = 1 << 20
PLANS = 16  # kept; the adapters of a base are made by a few recipes
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class _Module:
    """A and B of one linear."""

    name: str
    group: LinearGroup
    part: int  # place in the group
    layer: int
    scale: float
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where everything is in a file, and where it goes: the same for all files alike."""

    config: AnyConfig
    modules: Sequence[_Module]  # in the order of their names
    bucket: int
    whole: bool  # every linear of the base is one of them
    parts: Parts[Tensor]
    table: Any  # for the compiled operators
    most_bytes: int  # of what it is converted to
    cloned_bytes: int  # of what is misaligned: torch sees it only in a copy

    @property
    def vectors(self) -> bool:
        """Tell whether there is more than A and B."""
        return any(own.keys() - {"A", "B"} for own in self.parts.values())


class AdapterReader:
    """Reads and converts adapters for one base.

    Without `base` they may be nothing but LoRA. The operators that compute with adapters write
    them: `library`, or torch where it is None.
    """

    def __init__(
        self,
        layout: LoraLayout,
        dtype: torch.dtype,
        max_rank: int,
        base: BaseLayers | None = None,
        library: Library | None = None,
    ) -> None:
        self.layout, self.dtype, self.max_rank = layout, dtype, max_rank
        self.base, self.library = base, library
        # Names, shapes and places of hundreds of tensors take as long as their bytes.
        self._plan = lru_cache(PLANS)(self._make_plan)
        self._spares = SpareMemory()

    def read(self, source: Path | AdapterFiles, ref: AdapterRef) -> HostAdapter:
        """Read an adapter from its folder or from memory.

        Raises AdapterLoadFailed, and nothing else for bad files.
        """
        try:
            files = _read_files(source) if isinstance(source, Path) else source
            data = b"".join(files.weights)
            plan = self._plan(*_outline(AdapterFiles(files.config, [data])))
            tensors = _see(data, plan.parts) if self._sees(plan) else {}
            found = None
            if plan.vectors:
                assert self.base is not None
                found = read_vectors(plan.config, tensors, self.layout, self.base, self.dtype)
            memory, size = self._memory(plan, found), self.layout.size(plan.bucket)
            if self.library is None:
                self._write_by_torch(plan, tensors, memory[:size])
            else:
                self._write(plan, data, self.library, memory[:size])
            vectors = found.write(memory[size:]) if found and found.size_bytes else None
        except (WardrobeError, OSError) as error:
            raise AdapterLoadFailed(f"{ref.label} cannot be loaded: {error}") from error
        except Unfit as fault:
            raise AdapterLoadFailed(f"{ref.label} cannot be worn: {fault}") from fault
        return HostAdapter(ref.digest, plan.bucket, memory, vectors)

    def measure(self, source: Path | AdapterFiles) -> int:
        """Return the bytes that `read` takes at most: of the file, and of what it is converted to.

        Of what is no adapter that can be worn, as `read` will say, it is those of the file.
        """
        try:
            held = _held_bytes(source)
        except OSError:
            return 0
        try:
            plan = self._plan(*_outline(source))
        except (WardrobeError, OSError, Unfit):
            return held
        held += plan.cloned_bytes if self._sees(plan) else 0
        if self.library is not None:
            return held + plan.most_bytes
        # Torch unpacks the base's head beside it, and a GPU wants a copy in pages that stay, of
        # which torch takes the next power of two.
        return held + plan.most_bytes + (1 << (plan.most_bytes - 1).bit_length())

    def _make_plan(self, config_file: bytes, header: bytes, size: int) -> _Plan:
        """Raises Unfit and Refused. What is wrong with an adapter is said each time."""
        config = parse_config(parse_object(config_file, CONFIG_NAME))
        parts = _sorted(parse_header(header, size, Path(WEIGHTS_NAME), ADAPTER_BOUNDS))
        pairs = {module: (own["A"], own["B"]) for module, own in parts.items() if "A" in own}
        rank = max((a.shape[0] for a, _ in pairs.values() if a.shape), default=1)
        if rank > self.max_rank:
            raise Unfit(f"its rank is {rank}, the engine's highest is {self.max_rank}.")
        modules = [self._module(config, name, *pair) for name, pair in sorted(pairs.items())]
        bucket = bucket_of(rank)
        return _Plan(
            config,
            modules,
            bucket,
            len(modules) == self.layout.linears,
            parts,
            None if self.library is None else self._table(modules, bucket),
            self.layout.size(bucket) * self.dtype.itemsize
            + most_bytes(parts, self.layout, self.dtype),
            sum(
                tensor.stop - tensor.start
                for own in parts.values()
                for tensor in own.values()
                if _misaligned(tensor)
            ),
        )

    def _sees(self, plan: _Plan) -> bool:
        """Tell whether torch computes with tensors of the file."""
        return plan.vectors or self.library is None

    def _module(self, config: AnyConfig, name: str, a: Tensor, b: Tensor) -> _Module:
        assert isinstance(config, AdapterConfig)  # no other has A and B
        group, part, layer = self.layout.place(name)
        rank = config.rank(name)
        wanted, found = ((rank, group.inputs), (group.outputs[part], rank)), (a.shape, b.shape)
        if found != wanted:
            raise Unfit(f"{name}: A and B have shapes {found}, the base and config want {wanted}.")
        if strange := {a.dtype, b.dtype} - FORMATS.keys():
            raise _unread(name, min(strange))
        return _Module(name, group, part, layer, config.scale(name), a, b)

    def _table(self, modules: Sequence[_Module], bucket: int) -> Any:
        """Return where A and B of each module lie in the file and in an adapter, as an array."""
        nowhere = torch.empty(self.layout.size(bucket), device="meta")
        stacks = self.layout.stacks(nowhere, bucket)
        table = (FileTensorC * (2 * len(modules)))()
        for number, module in enumerate(modules):
            group, part, layer = module.group, module.part, module.layer
            a, b = stacks[group.name][0], stacks[group.name][1 + part]
            to_a = int(a.storage_offset()) + layer * a.stride(0) + part * bucket * group.inputs
            to_b = int(b.storage_offset()) + layer * b.stride(0)
            first = panel_offset(group, part)
            table[2 * number] = _file_tensor(module.a, to_a, bucket)
            table[2 * number + 1] = _file_tensor(module.b, to_b, bucket, first, module.scale)
        return table

    def _memory(self, plan: _Plan, vectors: FileVectors | None) -> torch.Tensor:
        """Return memory for all of an adapter, zero where nothing is written."""
        size = self.layout.size(plan.bucket)
        if vectors is not None and vectors.size_bytes:
            more = vectors.size_bytes // self.dtype.itemsize
            return torch.zeros(size + more, dtype=self.dtype)
        if self.library is None:
            return torch.zeros(size, dtype=self.dtype)
        spare = self._spares.take(size * self.dtype.itemsize)
        if spare is not None:
            return spare.view(self.dtype)
        return (torch.empty if plan.whole else torch.zeros)(size, dtype=self.dtype)

    def _write(self, plan: _Plan, data: bytes, library: Library, weights: torch.Tensor) -> None:
        """Write A and B of all modules; where there are none nothing is written."""
        done = library.write_adapter(data, plan.table, weights)
        if done < len(plan.table):
            raise self._not_finite(plan.modules[done // 2].name)

    def _write_by_torch(
        self, plan: _Plan, tensors: Parts[torch.Tensor], weights: torch.Tensor
    ) -> None:
        """The same, as the other operators read it."""
        stacks = self.layout.stacks(weights, plan.bucket)
        groups = {name: tuple(half[:, 0] for half in halves) for name, halves in stacks.items()}
        alike: dict[tuple[LinearGroup, int, int, float], list[_Module]] = defaultdict(list)
        for module in plan.modules:
            alike[module.group, module.part, module.rank, module.scale].append(module)
        for (group, part, _, scale), found in alike.items():  # layers at once: calls take most time
            found.sort(key=attrgetter("layer"))
            a = torch.stack([tensors[module.name]["A"] for module in found])
            b = torch.stack([tensors[module.name]["B"] for module in found])
            layers = [module.layer for module in found]
            self.layout.write(groups[group.name], (group, part), layers, a, b, scale)
        if not weights.sum().isfinite():  # or only the sum is too large, which the next look tells
            for name, halves in groups.items():
                if not all(tensor.isfinite().all() for tensor in halves):
                    raise self._not_finite(name)

    def _not_finite(self, where: str) -> Unfit:
        return Unfit(f"a weight of {where} is not a finite number in {self.dtype}.")


def _read_files(folder: Path) -> AdapterFiles:
    return AdapterFiles(_read_config(folder), [(folder / WEIGHTS_NAME).read_bytes()])


def _read_config(folder: Path) -> bytes:
    config = folder / CONFIG_NAME
    check_size(config, MAX_CONFIG_BYTES)
    return config.read_bytes()


def _outline(source: Path | AdapterFiles) -> tuple[bytes, bytes, int]:
    """Return the configuration, and the header and size of the weights. Raises Refused, OSError."""
    name = Path(WEIGHTS_NAME)
    if isinstance(source, AdapterFiles):
        size = sum(map(len, source.weights))
        return source.config, header_of(source.weights, size, name, ADAPTER_BOUNDS), size
    size = (source / name).stat().st_size
    return _read_config(source), header_in(source / name, size, ADAPTER_BOUNDS), size


def _held_bytes(source: Path | AdapterFiles) -> int:
    """Return what the weights of a file take while they are read: in pieces they are joined."""
    if isinstance(source, Path):
        return (source / WEIGHTS_NAME).stat().st_size
    return sum(map(len, source.weights)) * (1 if len(source.weights) == 1 else 2)


def _see(data: bytes, parts: Parts[Tensor]) -> Parts[torch.Tensor]:
    """See the tensors of a file where they lie; they are there as long as `data` is. Raises Unfit.

    torch warns of memory that nobody may write to, hence the detour. Nobody writes to it.
    """
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    assert address is not None
    place = torch.frombuffer((ctypes.c_uint8 * len(data)).from_address(address), dtype=torch.uint8)

    def see(tensor: Tensor) -> torch.Tensor:
        if tensor.dtype not in DTYPES:
            raise _unread(tensor.name, tensor.dtype)
        own = place[tensor.start : tensor.stop]
        whole = own.clone() if _misaligned(tensor) else own
        return whole.view(DTYPES[tensor.dtype]).view(tensor.shape)

    return {m: {part: see(tensor) for part, tensor in own.items()} for m, own in parts.items()}


def _misaligned(tensor: Tensor) -> bool:
    """Tell whether torch cannot see it where it lies: a header may let numbers begin anywhere."""
    dtype = DTYPES.get(tensor.dtype)
    return dtype is not None and tensor.start % dtype.itemsize != 0


def _unread(name: str, dtype: str) -> Unfit:
    return Unfit(f"{name} is {dtype}; save it as {', '.join(FORMATS)}.")


def _sorted(tensors: Mapping[str, Tensor]) -> Parts[Tensor]:
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


def _file_tensor(
    tensor: Tensor, to: int, rank: int, first: int = -1, scale: float = 1.0
) -> FileTensorC:
    return FileTensorC(tensor.start, FORMATS[tensor.dtype], *tensor.shape, to, rank, first, scale)
