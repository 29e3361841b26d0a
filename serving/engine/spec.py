"""The shape of a base model: what its config.json says, and whether this engine computes it.

A field that would change the answers and is not computed here is refused at start, by name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from registry.architectures import LLAMA_FAMILY, read_base_config, unsupported_architecture
from serving.engine.boundary import EngineUnavailable

ROTARY_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that read the same input and are computed as one."""

    name: str
    modules: tuple[str, ...]  # inside a layer, for example self_attn.q_proj
    inputs: int
    outputs: tuple[int, ...]  # one for each module


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ABC):
    """What the engine around a forward pass must know of a base."""

    architecture: str
    vocab: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int  # tokens the base was made for
    windows: tuple[int | None, ...]  # attention window of each layer, None is unbounded
    eos_ids: frozenset[int]
    folder: Path = Path()  # tokenizer.json is here; a base of random weights has none
    prefix: str = "model.layers."  # of a layer's modules in PEFT's names, before its number

    @property
    @abstractmethod
    def groups(self) -> tuple[LinearGroup, ...]:
        """The linears of a layer that an adapter can change."""

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(DecoderSpec):
    """A decoder of the Llama family."""

    hidden: int
    heads: int
    intermediate: int
    eps: float
    inverse_frequencies: tuple[float, ...]  # of the rotary embedding, head_dim / 2 of them
    rotary_scale: float = 1.0  # what the rotated heads are multiplied by
    head_norm: bool  # Qwen3 normalises each query and key head
    tied: bool  # the output head is the embedding

    @classmethod
    def read(cls, folder: Path) -> "ModelSpec":
        """Read config.json and generation_config.json. Raises EngineUnavailable with the reason."""
        config = read_config(folder)
        _check(config, folder)
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        frequencies, scale = _rotary(config, folder)
        return cls(
            architecture=config.model_type,
            vocab=config.vocab_size,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
            eps=config.rms_norm_eps,
            context=exact_context(config),
            windows=_windows(config),
            inverse_frequencies=frequencies,
            rotary_scale=scale,
            head_norm=config.model_type == "qwen3",
            tied=bool(config.tie_word_embeddings),
            eos_ids=eos_ids(config, folder),
            folder=folder,
        )

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            LinearGroup(
                "qkv",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                self.hidden,
                (queries, keys, keys),
            ),
            LinearGroup("o", ("self_attn.o_proj",), queries, (self.hidden,)),
            LinearGroup(
                "gate_up",
                ("mlp.gate_proj", "mlp.up_proj"),
                self.hidden,
                (self.intermediate, self.intermediate),
            ),
            LinearGroup("down", ("mlp.down_proj",), self.intermediate, (self.hidden,)),
        )


def check_architecture(folder: Path) -> str:
    """Return the model_type of config.json. Raises EngineUnavailable when nothing computes it."""
    config = read_base_config(folder)
    if problem := unsupported_architecture(config):
        raise EngineUnavailable(f"{folder}/config.json: {problem}")
    if config.get("quantization_config"):
        raise _unsupported(folder, "quantization_config", "set", "plain weights")
    return config["model_type"]


def read_config(folder: Path) -> Any:
    """Return config.json as the class of its architecture. Raises EngineUnavailable."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise EngineUnavailable(f"{folder}/config.json cannot be read: {error}") from error


def exact_context(config: Any) -> int:
    """Return the tokens up to which the rotary angles of a position never change.

    LongRoPE turns to other angles when a sequence grows beyond its original length. What lies in
    the cache keeps the old ones, so a longer sequence would depend on how it was read.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 has one for each kind of layer.
    every = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    lengths = [
        each["original_max_position_embeddings"]
        for each in every
        if each.get("rope_type") == "longrope"
    ]
    return min([config.max_position_embeddings, *lengths])


def _check(config: Any, folder: Path) -> None:
    if config.model_type not in LLAMA_FAMILY:
        wanted = f"{', '.join(LLAMA_FAMILY)} in its own forward pass"
        raise _unsupported(folder, "model_type", config.model_type, wanted)
    if config.hidden_act != "silu":
        raise _unsupported(folder, "hidden_act", config.hidden_act, "'silu'")
    if (config.num_attention_heads % (config.num_key_value_heads or 1)) != 0:
        found = f"{config.num_attention_heads} heads, {config.num_key_value_heads} KV heads"
        raise _unsupported(folder, "num_attention_heads", found, "a multiple of the KV heads")


def _unsupported(folder: Path, field: str, value: object, wanted: str) -> EngineUnavailable:
    return EngineUnavailable(f"{folder}/config.json: {field}={value!r}; this engine runs {wanted}.")


def _windows(config: Any) -> tuple[int | None, ...]:
    """Mistral slides in every layer, Qwen in those that layer_types names."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if not window or config.model_type == "llama":
        return (None,) * layers
    if config.model_type == "mistral":
        return (window,) * layers
    kinds = config.layer_types
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rotary(config: Any, folder: Path) -> tuple[tuple[float, ...], float]:
    """Return the inverse frequencies and the factor of the rotated heads, as transformers has them.

    "dynamic" stretches the angles only beyond max_position_embeddings, which is never reached.
    """
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ROTARY_KINDS:
        wanted = f"whole-head rotary embeddings of the kinds {', '.join(ROTARY_KINDS)}"
        raise _unsupported(folder, "rope_parameters", rope, wanted)
    if kind != "default":
        inverse, scale = ROPE_INIT_FUNCTIONS[kind](config)
        return tuple(inverse.tolist()), float(scale)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return tuple((1.0 / rope["rope_theta"] ** exponents).tolist()), 1.0


def eos_ids(config: Any, folder: Path) -> frozenset[int]:
    """Return the ends of text that both files name; either may hold one id or a list."""
    sources = [config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        sources.append(generation.eos_token_id)  # type: ignore[attr-defined]  # set from the file
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else () if source is None else (source,))
    # One beyond the vocabulary ends nothing, and could not be masked where an end is forbidden.
    return frozenset(i for i in ids if i < config.vocab_size)
