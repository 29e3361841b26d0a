"""Read a base model's safetensors, sharded or not, into the tensors the forward pass needs."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open

from registry.tensors import read_folder, tensor_files
from serving.engine.boundary import EngineUnavailable
from serving.engine.spec import LinearGroup, ModelSpec

L = TypeVar("L")  # the kind of linear: Linear or PackedLinear
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], L]


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[L]):
    """One decoder layer; `linears` has the names of `ModelSpec.groups`."""

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    linears: Mapping[str, L]


@dataclass(frozen=True, slots=True)
class ModelWeights(Generic[L]):
    """A base model. Nothing here is ever written after it was read."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights[L], ...]
    norm: torch.Tensor
    head: L


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format of the largest stored tensor."""
    largest = max(read_folder(folder).values(), key=lambda tensor: tensor.stop - tensor.start)
    with safe_open(largest.path, framework="pt") as file:
        return file.get_slice(largest.name)[:1].dtype


def read_weights(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    linear: MakeLinear[L],
) -> ModelWeights[L]:
    """Read, cast and fuse. Raises EngineUnavailable when a tensor is missing, misshapen or left."""
    with ExitStack() as stack:
        read = _Reader(folder, device, dtype, stack)
        embedding = read("model.embed_tokens.weight", (spec.vocab, spec.hidden))
        weights = ModelWeights(
            embedding=embedding,
            layers=tuple(
                _read_layer(read, spec, f"model.layers.{i}.", linear) for i in range(spec.layers)
            ),
            norm=read("model.norm.weight", (spec.hidden,)),
            head=linear(_read_head(read, spec, embedding), None),
        )
        if left := sorted(read.unread()):
            raise EngineUnavailable(
                f"{folder} has {len(left)} tensors that {spec.architecture} does not compute with, "
                f"for example {left[0]!r}."
            )
        return weights


class _Reader:
    """Find each tensor in whichever file holds it."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, stack: ExitStack
    ) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._files: dict[str, Any] = {}
        self._read: set[str] = set()
        for path in tensor_files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._files:
            raise EngineUnavailable(f"{self.folder} has no tensor {name!r}; pull the base again.")
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise EngineUnavailable(
                f"{self.folder}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}."
            )
        self._read.add(name)
        return tensor.to(self.device, self.dtype)

    def unread(self) -> set[str]:
        """Return the names that nobody asked for; old Llama files have their angles with them."""
        left = self._files.keys() - self._read
        return {name for name in left if not name.endswith("rotary_emb.inv_freq")}


def _read_head(read: _Reader, spec: ModelSpec, embedding: torch.Tensor) -> torch.Tensor:
    shape = (spec.vocab, spec.hidden)
    if not spec.tied:
        return read("lm_head.weight", shape)
    # transformers would take the head of the file, against what the configuration says.
    if "lm_head.weight" in read and not torch.equal(read("lm_head.weight", shape), embedding):
        raise EngineUnavailable(
            f"{read.folder}: config.json ties the head to the embedding, but lm_head.weight "
            "differs from it. Set tie_word_embeddings to false there."
        )
    return embedding


def _read_layer(
    read: _Reader, spec: ModelSpec, prefix: str, linear: MakeLinear[L]
) -> LayerWeights[L]:
    head = (spec.head_dim,)
    return LayerWeights(
        attention_norm=read(f"{prefix}input_layernorm.weight", (spec.hidden,)),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight", (spec.hidden,)),
        query_norm=read(f"{prefix}self_attn.q_norm.weight", head) if spec.head_norm else None,
        key_norm=read(f"{prefix}self_attn.k_norm.weight", head) if spec.head_norm else None,
        linears={g.name: linear(*_read_group(read, prefix, g)) for g in spec.groups},
    )


def _read_group(
    read: _Reader, prefix: str, group: LinearGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stack the linears of a group; a bias that only some of them have is zero for the others."""
    weights = [
        read(f"{prefix}{module}.weight", (out, group.inputs))
        for module, out in zip(group.modules, group.outputs, strict=True)
    ]
    names = [f"{prefix}{module}.bias" for module in group.modules]
    biases = [
        read(name, (weight.shape[0],)) if name in read else weight.new_zeros(weight.shape[0])
        for name, weight in zip(names, weights, strict=True)
    ]
    biased = any(name in read for name in names)
    return torch.cat(weights), torch.cat(biases) if biased else None
