"""The forward pass of bases that `model.py` does not compute: transformers' own, over our cache."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from serving.engine.batch import Batch
from serving.engine.boundary import EngineUnavailable
from serving.engine.kv_cache import KVCache
from serving.engine.kv_slots import KVSlots
from serving.engine.lora import LoraStacks
from serving.engine.ops import Operators
from serving.engine.ops.attention import AttentionPlan, Window, attend, plan_attention
from serving.engine.ops.lora import LoraPlan, Run, apply_lora, merge_runs, plan_lora
from serving.engine.ops.native.library import Library
from serving.engine.spec import DecoderSpec, LinearGroup, eos_ids, exact_context, read_config
from serving.engine.transformers_network import Network, Norm
from serving.engine.vector_file import BaseLayers
from serving.engine.vectors import (
    Dressed,
    TokenRows,
    dress_embeddings,
    dress_logits,
    dress_outputs,
    dressed_rows,
    sampled_of,
)

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSpec(DecoderSpec):
    """A decoder that transformers computes; each of its linears is a group of its own."""

    linears: tuple[LinearGroup, ...]
    softcap: bool  # some layer bends its scores

    @classmethod
    def measure(cls, folder: Path, network: Network) -> "TransformersSpec":
        """Ask the network itself what its attention is given. Raises EngineUnavailable."""
        config, found = read_config(folder), _Measurement()
        row = torch.zeros(1, dtype=torch.int64, device=network.device)
        network.logits(row, row, row, found)
        shapes = {heads for heads, _, _ in found.layers.values()}
        if len(shapes) != 1 or len(found.layers) != config.num_hidden_layers:
            raise EngineUnavailable(
                f"{folder}: {len(found.layers)} of {config.num_hidden_layers} layers attend, with "
                f"KV heads of {sorted(shapes)}; this engine keeps the same for every layer."
            )
        [(kv_heads, head_dim)] = shapes
        windows = tuple(window for _, (_, window, _) in sorted(found.layers.items()))
        _check_windows(config, windows, folder)
        return cls(
            architecture=config.model_type,
            vocab=config.vocab_size,
            layers=len(found.layers),
            kv_heads=kv_heads,
            head_dim=head_dim,
            context=exact_context(config),
            windows=windows,
            linears=network.linears,
            softcap=any(softcap for _, _, softcap in found.layers.values()),
            eos_ids=eos_ids(config, folder),
            folder=folder,
            prefix=network.prefix,
        )

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return self.linears


def _check_windows(config: Any, windows: tuple[Window, ...], folder: Path) -> None:
    """Raise where a layer keeps its window to itself: some have it in the mask only."""
    told = {"full_attention": False, "sliding_attention": True}
    kinds: list[str] = getattr(config, "layer_types", None) or []
    for layer, (kind, window) in enumerate(zip(kinds, windows, strict=False)):
        if told.get(kind) is not (window is not None):
            raise EngineUnavailable(
                f"{folder}/config.json: layer {layer} is {kind!r} and gives its attention the "
                f"window {window}; this engine would compute something else."
            )


class TransformersModel:
    """A network of transformers over the engine's cache; see `model_runner.Forward`.

    With a library, attention, LoRA and the greedy choice are compiled, as the network's linears
    must be; without one they are torch's.
    """

    def __init__(
        self,
        spec: TransformersSpec,
        network: Network,
        length: int,
        library: Library | None,
        name: str,
    ) -> None:
        self.spec, self.network, self.library = spec, network, library
        self.dtype, self.device = network.dtype, network.device
        self.length = length  # tokens of one sequence
        # Torch's attention alone bends scores; a panel of keys is of pairs of numbers.
        self._packed_keys = library is not None and not spec.softcap and spec.head_dim % 2 == 0
        bodies = library or Operators()
        self.greedy, self.sample = bodies.greedy, bodies.sample
        self._copy_blocks = bodies.copy_blocks
        self.operators = f"{name} in transformers' forward pass of {spec.architecture}"

    def kv_cache(self, slots: int, blocks: int) -> KVCache:
        return KVSlots(
            *(self.spec, slots, self.length, blocks),
            *(self.dtype, self.device, self._copy_blocks, self._packed_keys),
        )

    @property
    def base_layers(self) -> BaseLayers:
        own, spec = self.network, self.spec
        return BaseLayers(
            *(own.products, own.norms, own.embedding, own.head),
            *(spec.kv_heads, spec.head_dim, own.tied),
        )

    def forward(self, batch: Batch, cache: KVCache, stacks: LoraStacks) -> torch.Tensor:
        plan, lora = None, None
        if not self._packed_keys:
            windows = self.spec.windows
            plan = plan_attention(batch, windows, cache.length, self.dtype, self.device)
        if self.library is None:
            lora = plan_lora(batch.worn, self.device)
        runs, dressed = merge_runs(batch.worn), dressed_rows(batch.worn, stacks.vectors)
        batch = batch.to(self.device)
        step = _Step(batch, cache, stacks, self.library, plan, lora, runs, dressed)
        return self.network.logits(batch.ids, batch.positions, batch.sampled, step)


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one step share; see `transformers_network.Inside`."""

    batch: Batch
    cache: KVCache
    stacks: LoraStacks
    library: Library | None
    plan: AttentionPlan | None  # of torch's attention; None: the operators attend
    lora: LoraPlan | None  # of torch's LoRA
    runs: list[Run]
    dressed: Dressed

    def attend(
        self, layer: int, heads: Heads, scale: float, window: Window, softcap: float | None
    ) -> torch.Tensor:
        q, k, v = heads
        slots, positions = self.batch.slots, self.batch.positions
        self.cache.store(layer, slots, positions, k, v)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        # The operators divide by sqrt(dim); a base that scales otherwise has it made up for here.
        factor = scale * q.shape[-1] ** 0.5
        q = (q if abs(factor - 1.0) < 1e-6 else q * factor).contiguous()
        if self.plan is not None:
            return attend(q, keys, values, self.plan, window, softcap)
        assert self.library is not None
        return self.library.attention(q, keys, values, slots, positions, window)

    def adapt(self, group: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        self._check_rows(group, x)
        if self.library is not None and self.runs:
            self.library.lora(y, x, self.stacks.whole(group), y.shape[1:], layer, self.runs)
        elif self.lora is not None:
            apply_lora(y, x, self.stacks.weights(group, layer), self.lora)
        dress_outputs(y, group, layer, self.dressed)

    def embed(self, x: torch.Tensor, scale: torch.Tensor | None) -> None:
        dress_embeddings(x, self.batch.ids, self.dressed, scale)

    def normalise(self, norm: Norm, x: torch.Tensor, h: torch.Tensor) -> None:
        self._check_rows("a norm", x)
        for rows, vectors in self.dressed:
            if vectors.norms is not None:
                h[rows] = norm(x[rows], vectors.norms)

    def predict(self, h: torch.Tensor, logits: torch.Tensor) -> None:
        dressed = sampled_of(self.dressed, self.batch.sampled)
        dress_logits(logits, h, dressed, self._head_product)

    def _check_rows(self, name: str, x: torch.Tensor) -> None:
        """Raise RuntimeError where a module reads other rows than those of the step."""
        if len(x) != len(self.batch.ids):
            raise RuntimeError(f"{name} reads {len(x)} rows of a step of {len(self.batch.ids)}.")

    def _head_product(self, h: torch.Tensor, head: TokenRows) -> torch.Tensor:
        if self.library is None:
            return h @ head.rows.t()
        return self.library.linear(h, head.rows, None, len(head.ids))


@dataclass(frozen=True, slots=True)
class _Measurement:
    """Stands where a step does, and writes down what the attention of each layer is given."""

    layers: dict[int, tuple[tuple[int, int], Window, float | None]] = field(default_factory=dict)

    def attend(
        self, layer: int, heads: Heads, scale: float, window: Window, softcap: float | None
    ) -> torch.Tensor:
        q, k, v = heads
        if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
            shapes = [tuple(each.shape[1:]) for each in heads]
            raise EngineUnavailable(
                f"Layer {layer} attends with queries, keys and values of {shapes}, which this "
                "engine's cache cannot hold."
            )
        self.layers[layer] = (k.shape[1], k.shape[2]), window, softcap
        return q * scale  # of the right shape; nobody reads it

    def adapt(self, group: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        pass

    def embed(self, x: torch.Tensor, scale: torch.Tensor | None) -> None:
        pass

    def normalise(self, norm: Norm, x: torch.Tensor, h: torch.Tensor) -> None:
        pass

    def predict(self, h: torch.Tensor, logits: torch.Tensor) -> None:
        pass
