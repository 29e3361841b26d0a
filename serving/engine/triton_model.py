"""The forward pass of the Llama family for CUDA: linears by cuBLAS, the rest in ops/triton."""

import torch

from serving.engine.batch import Batch
from serving.engine.device_step import DeviceStep
from serving.engine.kv_cache import KVCache
from serving.engine.kv_pages import KVPages
from serving.engine.linear import Linear
from serving.engine.lora import LoraStacks
from serving.engine.ops.rope import rope_angles
from serving.engine.ops.sampling import greedy, sample
from serving.engine.ops.triton.activation import adapted_silu_mul, silu_mul
from serving.engine.ops.triton.attention import chunk_attention, decode_attention
from serving.engine.ops.triton.lora import DECODE_HEIGHT, Arena, lora
from serving.engine.ops.triton.norm import add_rms_norm, rms_norm
from serving.engine.ops.triton.rope import rotate_and_store
from serving.engine.ops.triton.vectors import RowNorms, VectorBook
from serving.engine.spec import ModelSpec
from serving.engine.step_graphs import StepGraphs, decode_shapes, prompt_shapes
from serving.engine.vector_file import BaseLayers
from serving.engine.vectors import dress_logits, dressed_rows, sampled_of
from serving.engine.weights import LayerWeights, ModelWeights


class TritonModel:
    """Frozen weights, and the arithmetic over them; see `model_runner.Forward`."""

    library = None

    def __init__(self, spec: ModelSpec, weights: ModelWeights[Linear], length: int) -> None:
        self.spec, self.weights, self.length = spec, weights, length
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self.greedy, self.sample, self.operators = greedy, sample, "Triton"
        frequencies = torch.tensor(spec.inverse_frequencies, device=self.device)
        self.cos, self.sin = rope_angles(frequencies, length, spec.rotary_scale)

    @property
    def base_layers(self) -> BaseLayers:
        own = self.weights
        return BaseLayers.of(self.spec, own.layers, own.norm, own.embedding, own.head)

    def kv_cache(self, slots: int, blocks: int) -> KVCache:
        return KVPages(self.spec, slots, self.length, blocks, self.dtype, self.device)

    def capture(self, cache: KVCache, stacks: LoraStacks, rows: int, tokens: int) -> None:
        """Lay steps down in advance. `forward` is of this cache and stacks."""
        assert isinstance(cache, KVPages), "it is what `kv_cache` returned"
        self._cache = cache
        self._arena = Arena(stacks)
        self._vectors = VectorBook(stacks.arena)
        self._aside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        shapes = [*decode_shapes(rows), *prompt_shapes(rows, tokens)]
        with torch.inference_mode():
            self.graphs = StepGraphs(self._hidden, shapes, self.device)

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:  # noqa: ARG002  # the captured one
        self._cache.settle()
        dressed = dressed_rows(batch.worn, stacks.vectors)
        vectors = self._vectors.places(dressed)
        hidden = self.graphs.run(batch, vectors)
        if hidden is None:
            hidden = self._hidden(DeviceStep.of(batch, vectors, self.device))
        logits = self.weights.head(hidden)
        sampled = sampled_of(dressed, batch.sampled)
        dress_logits(logits, hidden, sampled, lambda x, head: x @ head.rows.t())
        return logits

    def _hidden(self, step: DeviceStep) -> torch.Tensor:
        """Return [sampled, hidden], normalised for the head."""
        layers, eps = self.weights.layers, self.spec.eps
        following = (*(layer.attention_norm for layer in layers[1:]), self.weights.norm)
        if step.vectors is None:
            x = self.weights.embedding[step.ids]
        else:  # ids of virtual tokens are below 0
            x = self.weights.embedding[step.ids.clamp(min=0)]
            self._vectors.embed(x, step.ids, step.vectors)
        h = rms_norm(x, layers[0].attention_norm, eps, self._own_norms(0, step))
        for index, (layer, norm) in enumerate(zip(layers, following, strict=True)):
            here, there = (self._own_norms(2 * index + number, step) for number in (1, 2))
            added = self._linear("o", index, self._attention(index, h, step), step)
            h = add_rms_norm(x, *added, layer.mlp_norm, eps, here)
            h = self._gated(index, h, step)
            h = add_rms_norm(x, *self._linear("down", index, h, step), norm, eps, there)
        return h[step.sampled]

    def _own_norms(self, number: int, step: DeviceStep) -> RowNorms | None:
        return None if step.vectors is None else self._vectors.norms(step.vectors, number)

    def _linear(
        self, name: str, index: int, x: torch.Tensor, step: DeviceStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the linear gives and what adapters add to it.

        What a row's vectors scale and shift is the sum: then it is all in the first.
        """
        y, added = self._product(name, index, x, step)
        if step.vectors is not None:
            assert added is not None, "who wears vectors wears an adapter"
            self._vectors.dress(y, added, step.vectors, name, index)
        return y, added

    def _product(
        self, name: str, index: int, x: torch.Tensor, step: DeviceStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x Wᵀ and what LoRA adds to it.

        In a captured step of few rows they are computed side by side. Linears of many rows leave
        no room on the device, and uncaptured forks would cost the host more than they save.
        """
        linear = self.weights.layers[index].linears[name]
        if step.worn is None:
            return linear(x), None
        captured = self._aside is not None and torch.cuda.is_current_stream_capturing()
        if self._aside is None or not captured or step.worn.height != DECODE_HEIGHT:
            return linear(x), lora(x, step.worn, self._arena, name, index)
        steps = torch.cuda.current_stream()
        self._aside.wait_stream(steps)
        with torch.cuda.stream(self._aside):
            added = lora(x, step.worn, self._arena, name, index)
        y = linear(x)
        steps.wait_stream(self._aside)
        return y, added

    def _gated(self, index: int, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        tiles = None if step.vectors is not None else step.worn
        if tiles is None or tiles.height == DECODE_HEIGHT:
            return silu_mul(*self._linear("gate_up", index, x, step))
        gate_up = self.weights.layers[index].linears["gate_up"](x)
        return adapted_silu_mul(gate_up, x, tiles, self._arena, "gate_up", index)

    def _attention(self, index: int, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        spec, window = self.spec, self.spec.windows[index]
        pages = self._cache.layer(index)
        qkv, added = self._linear("qkv", index, x, step)
        qkv = qkv.view(len(x), -1, spec.head_dim)
        rotate_and_store(
            *(qkv, self.cos, self.sin, step.slots, step.positions, pages, added),
            _head_norms(self.weights.layers[index]),
            spec.eps,
        )
        out = x.new_empty(len(x), spec.heads, spec.head_dim)
        if len(step.singles):
            positions, few = step.positions[: len(step.singles)], bool(len(step.chunks))
            decode_attention(qkv, pages, step.singles, positions, window, out, few)
        if len(step.chunks):  # behind the other, which writes zeros for rows that are not its own
            chunk_attention(qkv, pages, step.chunks, window, out)
        return out.view(len(x), -1)


def _head_norms(layer: LayerWeights[Linear]) -> tuple[torch.Tensor, torch.Tensor] | None:
    if layer.query_norm is None or layer.key_norm is None:
        return None
    return layer.query_norm, layer.key_norm
