"""The forward pass of the Llama family in torch: Llama, Mistral, Qwen2 and Qwen3."""

from dataclasses import dataclass

import torch

from serving.engine.batch import Batch
from serving.engine.kv_cache import KVCache
from serving.engine.kv_slots import KVSlots
from serving.engine.linear import Linear
from serving.engine.lora import LoraStacks
from serving.engine.ops import Operators
from serving.engine.ops.attention import AttentionPlan, plan_attention
from serving.engine.ops.lora import LoraPlan, Worn, plan_lora
from serving.engine.ops.rope import rope_tables
from serving.engine.spec import ModelSpec
from serving.engine.vector_file import BaseLayers
from serving.engine.vectors import (
    Dressed,
    dress_embeddings,
    dress_logits,
    dress_norm,
    dress_outputs,
    dressed_rows,
    sampled_of,
)
from serving.engine.weights import ModelWeights


class Model:
    """Frozen weights, and the arithmetic over them."""

    library = None

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights[Linear],
        operators: Operators,
        length: int,
        name: str = "torch",
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.ops, self.operators = operators, name
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.length = length  # tokens of one sequence
        self.greedy, self.sample = operators.greedy, operators.sample
        frequencies = torch.tensor(spec.inverse_frequencies, device=self.device)
        self.cos, self.sin = rope_tables(frequencies, length, self.dtype, spec.rotary_scale)
        self._worn: Worn = ()
        self._lora: LoraPlan | None = None

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        plan = plan_attention(batch, self.spec.windows, cache.length, self.dtype, self.device)
        batch = batch.to(self.device)
        step = _Step(
            batch=batch,
            cache=cache,
            stacks=stacks,
            attention=plan,
            lora=self._lora_plan(batch.worn),
            dressed=dressed_rows(batch.worn, stacks.vectors),
            rotation=(self.cos[batch.positions], self.sin[batch.positions]),
        )
        # Virtual tokens have ids below 0; `dress_embeddings` writes their rows.
        x = self.weights.embedding[batch.ids.clamp(min=0)]
        dress_embeddings(x, batch.ids, step.dressed)
        for index, layer in enumerate(self.weights.layers):
            h = self._norm(x, layer.attention_norm, 2 * index, step.dressed)
            x = x.add_(self._linear("o", index, self._attention(index, h, step), step))
            h = self._norm(x, layer.mlp_norm, 2 * index + 1, step.dressed)
            h = self.ops.silu_mul(self._linear("gate_up", index, h, step))
            x = x.add_(self._linear("down", index, h, step))
        dressed = sampled_of(step.dressed, batch.sampled)
        h = self._norm(x[batch.sampled], self.weights.norm, 2 * self.spec.layers, dressed)
        logits = self.weights.head(h)
        dress_logits(logits, h, dressed, lambda x, head: x @ head.rows.t())
        return logits

    def kv_cache(self, slots: int, blocks: int) -> KVCache:
        return KVSlots(
            *(self.spec, slots, self.length, blocks),
            *(self.dtype, self.device, self.ops.copy_blocks),
        )

    @property
    def base_layers(self) -> BaseLayers:
        own = self.weights
        return BaseLayers.of(self.spec, own.layers, own.norm, own.embedding, own.head)

    def _norm(
        self, x: torch.Tensor, weight: torch.Tensor, number: int, dressed: Dressed
    ) -> torch.Tensor:
        h = self.ops.rms_norm(x, weight, self.spec.eps)
        dress_norm(h, x, self.ops.rms_norm, self.spec.eps, number, dressed)
        return h

    def _lora_plan(self, worn: Worn) -> LoraPlan | None:
        """Plan the adapters of this step; a decode step is mostly packed like the one before."""
        if worn != self._worn:
            self._lora, self._worn = plan_lora(worn, self.device), worn
        return self._lora

    def _linear(self, name: str, index: int, x: torch.Tensor, step: "_Step") -> torch.Tensor:
        y = self.weights.layers[index].linears[name](x)
        if step.lora is not None:
            self.ops.lora(y, x, step.stacks.weights(name, index), step.lora)
        dress_outputs(y, name, index, step.dressed)
        return y

    def _attention(self, index: int, x: torch.Tensor, step: "_Step") -> torch.Tensor:
        spec, layer, batch = self.spec, self.weights.layers[index], step.batch
        qkv = self._linear("qkv", index, x, step)
        heads = qkv.view(len(x), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        qk, v = heads.split((spec.heads + spec.kv_heads, spec.kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk.split((spec.heads, spec.kv_heads), dim=1)
            q = self.ops.rms_norm(q, layer.query_norm, spec.eps)
            qk = torch.cat((q, self.ops.rms_norm(k, layer.key_norm, spec.eps)), dim=1)
        q, k = self.ops.rope(qk, *step.rotation).split((spec.heads, spec.kv_heads), dim=1)
        step.cache.store(index, batch.slots, batch.positions, k, v)
        keys, values = step.cache.keys[index], step.cache.values[index]
        attended = self.ops.attend(q, keys, values, step.attention, spec.windows[index])
        return attended.reshape(len(x), -1)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share."""

    batch: Batch
    cache: KVCache
    stacks: LoraStacks
    attention: AttentionPlan
    lora: LoraPlan | None
    dressed: Dressed
    rotation: tuple[torch.Tensor, torch.Tensor]  # cos and sin of each row's position
