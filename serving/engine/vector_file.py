"""Vectors in PEFT files → Vectors as the model reads them, with what of the base they need.

Rows of tokens may be as many as a base's, gigabytes: they are compared with the base and converted
piece by piece, from where the file is to where they are worn.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from registry.lora import AdapterConfig
from registry.parts import EMBEDDING, HEAD, MATRICES, Parts
from registry.tensors import Tensor
from registry.vectors import AnyConfig
from serving.engine.linear import PANEL, CompiledLinear, Linear, pack
from serving.engine.lora import LoraLayout, Unfit
from serving.engine.spec import ModelSpec
from serving.engine.vectors import TokenRows, Vectors
from serving.engine.weights import LayerWeights

FLOAT = torch.float32
IDS = torch.int64
# part → times: a tied head has its tokens, too; a prefix is converted beside where it is written
ROWS = {"tokens": 2, "weight": 1, "prompt": 2}
PIECE = 1 << 18  # numbers that are compared, converted or checked at once

Frozen = Linear | CompiledLinear


@dataclass(frozen=True, slots=True)
class BaseLayers:
    """What of a base the vectors of an adapter replace or are relative to."""

    linears: Sequence[Mapping[str, Frozen]]  # of each layer, by the name of their group
    # module and parameter → [hidden]; an adapter's norms are in this order
    norms: Mapping[tuple[str, str], torch.Tensor]
    embedding: torch.Tensor | None  # None where only the head has it
    head: Frozen
    kv_heads: int
    head_dim: int
    tied: bool  # the head is the embedding

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        layers: Sequence[LayerWeights[Any]],
        norm: torch.Tensor,
        embedding: torch.Tensor | None,
        head: Any,
    ) -> "BaseLayers":
        """Return those of the engine's own forward pass."""
        norms: dict[tuple[str, str], torch.Tensor] = {}
        for number, layer in enumerate(layers):
            norms[f"{spec.prefix}{number}.input_layernorm", "weight"] = layer.attention_norm
            norms[f"{spec.prefix}{number}.post_attention_layernorm", "weight"] = layer.mlp_norm
        norms["model.norm", "weight"] = norm
        linears = [layer.linears for layer in layers]
        return cls(linears, norms, embedding, head, spec.kv_heads, spec.head_dim, spec.tied)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the embedding and of the head: vocabulary, hidden."""
        return self.head.shape

    def pieces(self, module: str, count: int) -> Iterator[torch.Tensor]:
        """Yield the embedding or the head by `count` rows, a multiple of PANEL."""
        if module == EMBEDDING and self.embedding is not None:
            yield from self.embedding.split(count)
        else:
            yield from self.head.pieces(count)


@dataclass(frozen=True, slots=True)
class FileRows:
    """What an adapter has in the place of the rows of some tokens, as its file has them."""

    ids: torch.Tensor  # of the tokens, ascending
    own: torch.Tensor  # [n, hidden]
    index: torch.Tensor  # which of them, one for each id
    packed: bool = False  # they are to be panels: a head of the compiled operators

    def outline(self, dtype: torch.dtype) -> TokenRows:
        """Return what `write` fills: the ids, and rows that have a size and no numbers."""
        rows, hidden = len(self.ids), self.own.shape[1]
        shape = (-(-rows // PANEL), PANEL * hidden) if self.packed else (rows, hidden)
        return TokenRows(self.ids, torch.empty(shape, dtype=dtype, device="meta"))

    def write(self, rows: torch.Tensor) -> None:
        """Convert them into a place for those of `outline`, piece by piece. Raises Unfit."""
        for piece in self.index.split(_rows_at_once(self.own)):
            converted = _finite(self.own[piece].to(rows.dtype))
            converted = pack(converted) if self.packed else converted
            place, rows = rows[: len(converted)], rows[len(converted) :]
            place.copy_(converted)


@dataclass(frozen=True, slots=True)
class FileVectors:
    """Everything but A and B, as large as it will be; its rows of tokens are still in the file."""

    outline: Vectors  # with rows of tokens that have no numbers
    embedding: FileRows | None
    head: FileRows | None

    @property
    def size_bytes(self) -> int:
        return self.outline.size_bytes

    def write(self, memory: torch.Tensor) -> Vectors:
        """Return it as it lies in `memory` then, of `size_bytes`. Raises Unfit."""
        laid = self.outline.laid_out(memory)
        for place, tensor in zip(laid.tensors(), self.outline.tensors(), strict=True):
            if not tensor.is_meta:
                place.copy_(_finite(tensor))
        for found, tokens in ((self.embedding, laid.embedding), (self.head, laid.head)):
            if found is not None and tokens is not None:
                found.write(tokens.rows)
        return laid


def read_vectors(
    config: AnyConfig,
    parts: Parts[torch.Tensor],
    layout: LoraLayout,
    base: BaseLayers,
    dtype: torch.dtype,
) -> FileVectors:
    """Return everything but A and B, still to be written. Raises Unfit."""
    outputs = _Outputs(layout, base)
    for module, own in parts.items():
        if (module, "weight") not in base.norms:
            outputs.add(module, own, config)
    rows = _rows(parts, config, layout, base, dtype)
    prompt = parts.get("", {}).get("prompt")
    prefix = None
    embedding, head = rows.get(EMBEDDING), rows.get(HEAD)
    if prompt is not None and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        prefix = _prefix(prompt, layout, base, dtype)
    elif prompt is not None:
        embedding = FileRows(virtual_ids(len(prompt)), prompt, torch.arange(len(prompt)))
    outline = Vectors(
        outputs.tables(),
        _norms(parts, base),
        embedding and embedding.outline(dtype),
        head and head.outline(dtype),
        prefix,
        0 if prompt is None else len(prompt),
    )
    return FileVectors(outline, embedding, head)


def most_bytes(parts: Parts[Tensor], layout: LoraLayout, dtype: torch.dtype) -> int:
    """Return the bytes that vectors take at most: when no row of a saved matrix is the base's."""
    outputs = sum(sum(group.outputs) for group in layout.groups)
    taken = 2 * 2 * layout.layers * outputs * FLOAT.itemsize  # scales and shifts; norms take less
    for own in parts.values():
        for part in own.keys() & ROWS.keys():
            rows, *width = own[part].shape or (1,)
            panels = -(-rows // PANEL)
            numbers = panels * PANEL * prod(width)
            taken += ROWS[part] * (numbers * dtype.itemsize + rows * IDS.itemsize)
    return taken


def virtual_ids(count: int) -> torch.Tensor:
    """Return the ids of the tokens before a prompt."""
    return torch.arange(-count, 0)


class _Outputs:
    """Scales and shifts of the linears, in the places where the fused groups have them."""

    def __init__(self, layout: LoraLayout, base: BaseLayers) -> None:
        self.layout, self.base = layout, base
        self._tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        return self._tables

    def add(self, module: str, own: Mapping[str, torch.Tensor], config: AnyConfig) -> None:
        """Put what the tensors of one module make of its outputs in place."""
        if not own.keys() & {"magnitude", "B_bias", "bias", "scale", "shift"}:
            return
        scale = own.get("scale")
        if scale is not None and scale.shape[0] == 1:
            # The input of down is the product of what gate and up give: scaling up scales it.
            module = module.replace("down_proj", "up_proj")
        group, part, layer = self.layout.place(module)
        linear = self.base.linears[layer][group.name]
        columns = slice(sum(group.outputs[:part]), sum(group.outputs[: part + 1]))
        scales, shifts = self._table(group.name, sum(group.outputs))
        if scale is not None:
            scales[layer, columns] *= scale.to(FLOAT).flatten()
        if "magnitude" in own:
            assert isinstance(config, AdapterConfig)
            lengths = _lengths(linear, columns, own["A"], config.scale(module), own["B"])
            scales[layer, columns] = own["magnitude"].to(FLOAT) / lengths
        bias = None if linear.bias is None else linear.bias[columns].to("cpu", FLOAT)
        shift = shifts[layer, columns]
        if "magnitude" in own and bias is not None:
            shift += bias - scales[layer, columns] * bias  # DoRA scales the product, not the bias
        if "bias" in own:
            assert bias is not None
            shift += own["bias"].to(FLOAT) - bias
        if "B_bias" in own:
            assert isinstance(config, AdapterConfig)
            shift += config.scale(module) * own["B_bias"].to(FLOAT)
        if "shift" in own:
            shift += own["shift"].to(FLOAT).flatten()

    def _table(self, group: str, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        if group not in self._tables:
            shape = (self.layout.layers, width)
            self._tables[group] = torch.ones(shape, dtype=FLOAT), torch.zeros(shape, dtype=FLOAT)
        return self._tables[group]


def _lengths(
    linear: Frozen, columns: slice, a: torch.Tensor, scale: float, b: torch.Tensor
) -> torch.Tensor:
    """Return ‖Wᵢ + s Bᵢ A‖ for each output i of some columns, which DoRA divides by.

    As ‖Wᵢ‖² + 2 s Bᵢ · A Wᵢ + s² Bᵢ A Aᵀ Bᵢ, by the base's own product: writing W + s B A and
    reading it again takes ten times as long.
    """
    a, b = a.to(FLOAT), scale * b.to(FLOAT)
    squares = linear.squares[columns].to("cpu")
    across = linear.product(a.to(linear.weight), columns).to("cpu", FLOAT)  # [rank, outputs]
    own = b @ (a @ a.mT)
    return (squares + (b * (2 * across.mT + own)).sum(1)).clamp_(min=0).sqrt_()


def _norms(parts: Parts[torch.Tensor], base: BaseLayers) -> torch.Tensor | None:
    strange = [
        module
        for module, found in parts.items()
        if "weight" in found and module not in MATRICES and (module, "weight") not in base.norms
    ]
    if strange:
        raise Unfit(f"{min(strange)} is no norm of this base that an adapter can have.")
    own = {
        (module, part): parts[module][part]
        for module, part in base.norms
        if part in parts.get(module, {})
    }
    if not own:
        return None
    table = ((place, norm.to("cpu")) for place, norm in base.norms.items())
    return torch.stack([own.get(place, norm).to(norm.dtype) for place, norm in table])


def _rows(
    parts: Parts[torch.Tensor],
    config: AnyConfig,
    layout: LoraLayout,
    base: BaseLayers,
    dtype: torch.dtype,
) -> Mapping[str, FileRows]:
    """Return the rows of the embedding and of the head that are not the base's."""
    rows: dict[str, FileRows] = {}
    for module in MATRICES:
        own = parts.get(module, {})
        packed = module == HEAD and layout.packed
        if "tokens" in own:
            ids, order = torch.tensor(config.tokens[module.rpartition(".")[2]]).sort()
            rows[module] = FileRows(ids, own["tokens"], order, packed)
            if base.tied:
                rows.setdefault(HEAD, replace(rows[module], packed=layout.packed))
        if "weight" in own:
            # On a tied base, too, peft trains a copy of the one and the other stays the base's.
            changed = _changed(own["weight"], base, module, dtype)
            if len(changed):
                rows[module] = FileRows(changed, own["weight"], changed, packed)
    return rows


def _changed(own: torch.Tensor, base: BaseLayers, module: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the tokens whose rows differ as the model computes with them. Raises Unfit."""
    if own.shape != base.shape:
        raise Unfit(f"{module}: its shape is {tuple(own.shape)}, the base's {base.shape}.")
    count = _rows_at_once(own)
    pieces = zip(own.split(count), base.pieces(module, count), strict=True)
    changed = [(mine.to(dtype) != its.to("cpu")).any(1) for mine, its in pieces]
    return torch.cat(changed).nonzero().flatten()


def _rows_at_once(rows: torch.Tensor) -> int:
    """Return how many make up a piece, in whole panels."""
    return max(1, PIECE // (PANEL * rows.shape[1])) * PANEL


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    pieces = tensor.flatten().split(PIECE)  # `isfinite` takes more memory than what it looks at
    if not all(piece.isfinite().all() for piece in pieces):
        raise Unfit(f"a vector of it is not finite in {tensor.dtype}.")
    return tensor


def _prefix(
    prompt: torch.Tensor, layout: LoraLayout, base: BaseLayers, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay [positions, layers · (key, value) · heads · dim] out as the cache has it."""
    shape = (len(prompt), layout.layers, 2, base.kv_heads, base.head_dim)
    keys, values = prompt.to(dtype).view(shape).permute(2, 1, 3, 0, 4).contiguous()
    return keys, values
