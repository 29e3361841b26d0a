"""Vectors in PEFT files → Vectors as the model reads them, with what of the base they need."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from registry.lora import AdapterConfig
from registry.parts import EMBEDDING, HEAD, MATRICES, Parts
from registry.vectors import AnyConfig
from serving.engine.linear import pack
from serving.engine.lora import LoraLayout, Unfit
from serving.engine.spec import ModelSpec
from serving.engine.vectors import TokenRows, Vectors
from serving.engine.weights import LayerWeights

FLOAT = torch.float32


ROWS_AT_ONCE = 4096  # of a saved embedding or head, while they are compared with the base


class Frozen(Protocol):
    """A frozen linear; see linear.py."""

    @property
    def weight(self) -> torch.Tensor: ...

    @property
    def bias(self) -> torch.Tensor | None: ...

    @property
    def squares(self) -> torch.Tensor: ...

    def dense(self) -> torch.Tensor: ...

    def product(self, x: torch.Tensor, columns: slice) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class BaseLayers:
    """What of a base the vectors of an adapter replace or are relative to."""

    layers: Sequence[LayerWeights[Frozen]]
    norm: torch.Tensor
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
        return cls(layers, norm, embedding, head, spec.kv_heads, spec.head_dim, spec.tied)

    def matrix(self, module: str) -> torch.Tensor:
        """Return the embedding or the head, [vocab, hidden]."""
        if module == EMBEDDING and self.embedding is not None:
            return self.embedding
        return self.head.dense()


def read_vectors(
    config: AnyConfig,
    parts: Parts[torch.Tensor],
    layout: LoraLayout,
    base: BaseLayers | None,
    dtype: torch.dtype,
) -> Vectors:
    """Return everything but A and B. Raises Unfit."""
    if base is None:
        raise Unfit(
            "it is more than LoRA, and these operators wear LoRA only (--operators torch wears it)."
        )
    outputs = _Outputs(layout, base)
    for module, own in parts.items():
        outputs.add(module, own, config)
    rows = _rows(parts, config, base, dtype)
    prompt = parts.get("", {}).get("prompt")
    prefix = None
    embedding, head = rows.get(EMBEDDING), rows.get(HEAD)
    if prompt is not None and config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        prefix = _prefix(prompt, layout, base, dtype)
    elif prompt is not None:
        embedding = TokenRows(virtual_ids(len(prompt)), prompt.to(dtype))
    if head is not None and layout.packed:
        head = TokenRows(head.ids, pack(head.rows))
    found = Vectors(
        outputs.tables(),
        _norms(parts, layout, base),
        embedding,
        head,
        prefix,
        0 if prompt is None else len(prompt),
    )
    if not all(tensor.isfinite().all() for tensor in found.tensors()):
        raise Unfit(f"a vector of it is not finite in {dtype}.")
    return found


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
        linear = self.base.layers[layer].linears[group.name]
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


def _norms(parts: Parts[torch.Tensor], layout: LoraLayout, base: BaseLayers) -> torch.Tensor | None:
    own = {
        module: found["weight"]
        for module, found in parts.items()
        if "weight" in found and module not in MATRICES
    }
    if not own:
        return None
    table = {name: norm.to("cpu") for name, norm in _named_norms(layout, base)}
    if strange := sorted(own.keys() - table.keys()):
        raise Unfit(f"{strange[0]} is no norm of this base that an adapter can have.")
    return torch.stack([own.get(name, norm).to(norm.dtype) for name, norm in table.items()])


def _named_norms(layout: LoraLayout, base: BaseLayers) -> Iterator[tuple[str, torch.Tensor]]:
    for number, layer in enumerate(base.layers):
        yield f"{layout.prefix}{number}.input_layernorm", layer.attention_norm
        yield f"{layout.prefix}{number}.post_attention_layernorm", layer.mlp_norm
    yield "model.norm", base.norm


def _rows(
    parts: Parts[torch.Tensor], config: AnyConfig, base: BaseLayers, dtype: torch.dtype
) -> Mapping[str, TokenRows]:
    """Return the rows of the embedding and of the head that are not the base's."""
    rows: dict[str, TokenRows] = {}
    for module in MATRICES:
        own = parts.get(module, {})
        if "tokens" in own:
            rows[module] = _token_rows(own["tokens"], config, module, dtype)
            if base.tied:
                rows.setdefault(HEAD, rows[module])
        if "weight" in own:
            # On a tied base, too, peft trains a copy of the one and the other stays the base's.
            changed = _changed_rows(own["weight"], base.matrix(module), module, dtype)
            if changed is not None:
                rows[module] = changed
    return rows


def _token_rows(
    rows: torch.Tensor, config: AnyConfig, module: str, dtype: torch.dtype
) -> TokenRows:
    ids, order = torch.tensor(config.tokens[module.rpartition(".")[2]]).sort()
    return TokenRows(ids, rows[order].to(dtype))


def _changed_rows(
    own: torch.Tensor, base: torch.Tensor, module: str, dtype: torch.dtype
) -> TokenRows | None:
    """Return the rows that differ as the model computes with them; all others are the base's."""
    if own.shape != base.shape:
        raise Unfit(f"{module}: its shape is {tuple(own.shape)}, the base's {tuple(base.shape)}.")
    ids, rows = list[torch.Tensor](), list[torch.Tensor]()
    for first in range(0, len(own), ROWS_AT_ONCE):  # the whole is as large as a part of the base
        here = slice(first, first + ROWS_AT_ONCE)
        part = own[here].to(dtype)
        changed = (part != base[here].to("cpu")).any(1).nonzero().flatten()
        ids.append(changed + first)
        rows.append(part[changed])
    found = TokenRows(torch.cat(ids), torch.cat(rows))
    return found if len(found.ids) else None


def _prefix(
    prompt: torch.Tensor, layout: LoraLayout, base: BaseLayers, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay [positions, layers · (key, value) · heads · dim] out as the cache has it."""
    shape = (len(prompt), layout.layers, 2, base.kv_heads, base.head_dim)
    keys, values = prompt.to(dtype).view(shape).permute(2, 1, 3, 0, 4).contiguous()
    return keys, values
