"""The shape of a base model: what its config.json says, and whether this engine computes it.

A field that would change the answers and is not computed here is refused at start, by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from serving.engine.boundary import EngineUnavailable

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears that read the same input and are computed as one."""

    name: str
    modules: tuple[str, ...]  # inside a layer, for example self_attn.q_proj
    inputs: int
    outputs: tuple[int, ...]  # one for each module


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of the Llama family."""

    architecture: str
    vocab: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    context: int  # tokens the base was made for
    windows: tuple[int | None, ...]  # attention window of each layer, None is unbounded
    inverse_frequencies: tuple[float, ...]  # of the rotary embedding, head_dim / 2 of them
    head_norm: bool  # Qwen3 normalises each query and key head
    tied: bool  # the output head is the embedding
    eos_ids: frozenset[int]
    folder: Path = Path()  # tokenizer.json is here; a base of random weights has none

    @classmethod
    def read(cls, folder: Path) -> "ModelSpec":
        """Read config.json and generation_config.json. Raises EngineUnavailable with the reason."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check(config, folder)
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
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
            context=config.max_position_embeddings,
            windows=_windows(config),
            inverse_frequencies=_inverse_frequencies(config.rope_parameters, head_dim),
            head_norm=config.model_type == "qwen3",
            tied=bool(config.tie_word_embeddings),
            eos_ids=_eos_ids(config, folder),
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

    def kv_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


def _check(config: Any, folder: Path) -> None:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise _unsupported(folder, "model_type", kind, f"one of {', '.join(ARCHITECTURES)}")
    if config.hidden_act != "silu":
        raise _unsupported(folder, "hidden_act", config.hidden_act, "'silu'")
    if getattr(config, "quantization_config", None):
        raise _unsupported(folder, "quantization_config", "set", "plain weights")
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


def _inverse_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Compute the rotary frequencies: the paper's (arXiv 2104.09864), linear and Llama 3 scaling.

    In float32 as transformers does, so that the angles are the same numbers.
    """
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "llama3"):
        raise EngineUnavailable(
            f"config.json: rope_parameters={rope!r}; this engine computes whole-head rotary "
            "embeddings of the kinds default, linear and llama3."
        )
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope["rope_theta"] ** exponents)
    if kind == "linear":
        inverse = inverse / rope["factor"]
    if kind == "llama3":
        inverse = _llama3(inverse, rope)
    return tuple(inverse.tolist())


def _llama3(inverse: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend between (Llama 3.1 report)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    stretched = inverse / rope["factor"]
    blend = (original / wavelength - low) / (high - low)
    mixed = (1 - blend) * stretched + blend * inverse
    result = torch.where(wavelength > original / low, stretched, inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, mixed, result)


def _eos_ids(config: Any, folder: Path) -> frozenset[int]:
    """Collect the ends of text of both files; either may hold one id or a list."""
    sources = [config.eos_token_id]
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
        sources.append(generation.eos_token_id)  # type: ignore[attr-defined]  # set from the file
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else () if source is None else (source,))
    # One beyond the vocabulary ends nothing, and could not be masked where an end is forbidden.
    return frozenset(i for i in ids if i < config.vocab_size)
