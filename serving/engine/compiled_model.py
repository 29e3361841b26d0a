"""The forward pass of the Llama family in C++ (ops/native/forward.h): one call for a whole step.

A row's result does not depend on the other rows, to the last bit: every sum runs in an order that
the row alone decides. A prompt read in chunks gives what it gives in one piece.
"""

from typing import Any

import torch

from serving.engine.batch import Batch
from serving.engine.kv_cache import KVCache
from serving.engine.kv_slots import KVSlots
from serving.engine.linear import CompiledLinear
from serving.engine.lora import LoraStacks
from serving.engine.ops.lora import merge_runs
from serving.engine.ops.native.compile import NotCompiled
from serving.engine.ops.native.layout import (
    LayerC,
    LinearC,
    ModelC,
    StepC,
    embedded_table,
    pointer,
    run_table,
    stack_table,
    vectors_table,
)
from serving.engine.ops.native.library import Library
from serving.engine.ops.rope import rope_angles
from serving.engine.spec import ModelSpec
from serving.engine.vector_file import BaseLayers
from serving.engine.vectors import TokenRows, dress_logits, dressed_rows, sampled_of
from serving.engine.weights import LayerWeights, ModelWeights


def check_compilable(spec: ModelSpec) -> None:
    """Raise NotCompiled when the compiled forward pass cannot compute this base."""
    odd = [n for n in (spec.hidden, spec.intermediate, spec.heads * spec.head_dim) if n % 2]
    if odd:
        raise NotCompiled(f"a linear of the base has {odd[0]} inputs, an odd number")


class CompiledModel:
    """Frozen weights, and the arithmetic over them; see `model_runner.Forward`."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights[CompiledLinear],
        library: Library,
        length: int,
    ) -> None:
        self.spec, self.library, self.length = spec, library, length
        self.dtype, self.device = weights.norm.dtype, weights.norm.device
        # The embedding of a tied base is read from the packed head: it is not kept twice.
        self.embedding = None if spec.tied else weights.embedding
        self.layers, self.norm, self.head = weights.layers, weights.norm, weights.head
        self.greedy, self.sample = library.greedy, library.sample
        self.operators = f"C++ ({library.target.name})"
        frequencies = torch.tensor(spec.inverse_frequencies)
        self._angles = rope_angles(frequencies, length, spec.rotary_scale)
        self._model = self._describe()
        self._stacks: LoraStacks | None = None

    def kv_cache(self, slots: int, blocks: int) -> KVCache:
        return KVSlots(
            *(self.spec, slots, self.length, blocks),
            *(self.dtype, self.device, self.library.copy_blocks),
            packed_keys=True,
        )

    @property
    def base_layers(self) -> BaseLayers:
        return BaseLayers.of(self.spec, self.layers, self.norm, self.embedding, self.head)

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        spec, rows, sampled = self.spec, len(batch.ids), len(batch.sampled)
        logits = torch.empty(sampled, spec.vocab, dtype=self.dtype)
        queries = spec.heads * spec.head_dim
        widths = (
            *(spec.hidden, spec.hidden, queries + 2 * spec.kv_heads * spec.head_dim, queries),
            *(2 * spec.intermediate, spec.intermediate),
        )
        space = [torch.empty(rows * width, dtype=self.dtype) for width in widths]
        step = StepC(
            *(rows, sampled, batch.ids.data_ptr(), batch.positions.data_ptr()),
            *(batch.slots.data_ptr(), batch.sampled.data_ptr(), *cache.values[0].shape[::2]),
            *(cache.keys[0].data_ptr(), cache.values[0].data_ptr()),
        )
        step.x, step.h, step.qkv, step.attended, step.gate_up, step.activated = (
            tensor.data_ptr() for tensor in space
        )
        step.logits = logits.data_ptr()
        if runs := merge_runs(batch.worn):
            step.runs, step.run = len(runs), run_table(runs, stacks.buckets)
            step.stacks[:] = self._stack_tables(stacks)
        dressed = dressed_rows(batch.worn, stacks.vectors)
        if dressed:
            embedded = embedded_table(batch.ids, dressed)
            step.embedded = embedded.data_ptr()
            step.vectors = vectors_table(dressed, [group.name for group in spec.groups], rows)
        self.library.forward(self._model, step)
        if dressed:
            normalised = space[1][: sampled * spec.hidden].view(sampled, spec.hidden)
            dress_logits(logits, normalised, sampled_of(dressed, batch.sampled), self._head_product)
        return logits

    def _head_product(self, x: torch.Tensor, head: TokenRows) -> torch.Tensor:
        return self.library.linear(x, head.rows, None, len(head.ids))

    def _stack_tables(self, stacks: LoraStacks) -> list[Any]:
        """Return the stacks of each group; their addresses stay while the stacks live."""
        if self._stacks is not stacks:
            self._stacks = stacks
            self._tables = [stack_table(stacks.whole(group.name)) for group in self.spec.groups]
        return self._tables

    def _describe(self) -> ModelC:
        """Return the addresses of the weights, which `self` keeps alive."""
        spec = self.spec
        cos, sin = self._angles
        layers = [
            self._layer(layer, window)
            for layer, window in zip(self.layers, spec.windows, strict=True)
        ]
        return ModelC(
            *(spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim),
            *(spec.intermediate, spec.vocab, spec.eps, (LayerC * len(layers))(*layers)),
            *(pointer(self.embedding), self.norm.data_ptr(), _linear(self.head)),
            *(cos.data_ptr(), sin.data_ptr()),
        )

    def _layer(self, layer: LayerWeights[CompiledLinear], window: int | None) -> LayerC:
        linears = (_linear(layer.linears[group.name]) for group in self.spec.groups)
        return LayerC(
            *(layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()),
            *(pointer(layer.query_norm), pointer(layer.key_norm), *linears, window or 0),
        )


def _linear(linear: CompiledLinear) -> LinearC:
    return LinearC(linear.weight.data_ptr(), pointer(linear.bias))
