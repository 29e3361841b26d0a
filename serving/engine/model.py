"""The forward pass of the Llama family: Llama, Mistral, Qwen2 and Qwen3."""

from collections.abc import Sequence

import torch

from serving.engine.batch import Batch, DecodeRows
from serving.engine.kv_cache import KVCache
from serving.engine.lora import LoraStacks
from serving.engine.ops import Operators
from serving.engine.ops.rope import rope_tables
from serving.engine.spec import ModelSpec
from serving.engine.weights import LayerWeights, ModelWeights


class Model:
    """Frozen weights, and the arithmetic over them."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, operators: Operators, length: int
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = operators
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self.length = length  # tokens of one sequence
        frequencies = torch.tensor(spec.inverse_frequencies, device=self.device)
        self.cos, self.sin = rope_tables(frequencies, length, self.dtype)

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        """Write the batch's keys and values, return logits [sampled, vocab].

        Running the same batch again writes the same values to the same positions.
        """
        x = self.weights.embedding[batch.ids]
        rotation = self.cos[batch.positions], self.sin[batch.positions]
        for index, layer in enumerate(self.weights.layers):
            h = self.ops.rms_norm(x, layer.attention_norm, self.spec.eps)
            attended = self._attention(index, layer, h, batch, cache, stacks, rotation)
            x = x.add_(self._linear("o", index, layer, attended, batch, stacks))
            h = self.ops.rms_norm(x, layer.mlp_norm, self.spec.eps)
            h = self.ops.silu_mul(self._linear("gate_up", index, layer, h, batch, stacks))
            x = x.add_(self._linear("down", index, layer, h, batch, stacks))
        x = self.ops.rms_norm(x[batch.sampled], self.weights.norm, self.spec.eps)
        return self.weights.head(x)

    def _linear(
        self,
        name: str,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        batch: Batch,
        stacks: LoraStacks,
    ) -> torch.Tensor:
        y = layer.linears[name](x)
        if batch.lora is not None:
            self.ops.lora(y, x, stacks.weights(name, index), batch.lora)
        return y

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: torch.Tensor,
        batch: Batch,
        cache: KVCache,
        stacks: LoraStacks,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        spec = self.spec
        qkv = self._linear("qkv", index, layer, x, batch, stacks)
        heads = qkv.view(len(x), spec.heads + 2 * spec.kv_heads, spec.head_dim)
        qk, v = heads.split((spec.heads + spec.kv_heads, spec.kv_heads), dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            q, k = qk.split((spec.heads, spec.kv_heads), dim=1)
            q = self.ops.rms_norm(q, layer.query_norm, spec.eps)
            qk = torch.cat((q, self.ops.rms_norm(k, layer.key_norm, spec.eps)), dim=1)
        q, k = self.ops.rope(qk, *rotation).split((spec.heads, spec.kv_heads), dim=1)
        keys, values = cache.keys[index], cache.values[index]
        keys[batch.slots, :, batch.positions] = k
        values[batch.slots, :, batch.positions] = v
        window = spec.windows[index]
        parts: list[torch.Tensor] = []
        if batch.decode is not None:
            parts.append(self._decode(q[: batch.decode.count], keys, values, batch.decode, window))
        for chunk in batch.chunks:
            end = chunk.position + chunk.stop - chunk.start
            seen_keys, seen_values = keys[chunk.slot, :, :end], values[chunk.slot, :, :end]
            rows = q[chunk.start : chunk.stop]
            parts.append(
                self.ops.chunk_attention(rows, seen_keys, seen_values, chunk.masks[window])
            )
        return _joined(parts).reshape(len(x), -1)

    def _decode(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: DecodeRows,
        window: int | None,
    ) -> torch.Tensor:
        """Lay the queries out by KV slot, so that the cache is read in place."""
        keys, values = keys[rows.slots, :, : rows.length], values[rows.slots, :, : rows.length]
        spread = q.contiguous() if rows.spread is None else q[rows.spread]
        out = self.ops.decode_attention(spread, keys, values, rows.biases[window])
        return out if rows.gather is None else out[rows.gather]


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
