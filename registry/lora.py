"""The configuration of one LoRA adapter: which modules, with which rank and which scale.

LoRA adds `scale · B(A(x))` to a linear layer, with A of shape (rank, in) and B of shape
(out, rank). The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from registry.config import check_config, plain_key
from registry.errors import Refused
from registry.parts import MATRICES

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What of an `adapter_config.json` decides the answers. Patterns keep the order of the file."""

    base_id: str  # as the file says it: a logical id, or the maker's local path
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]  # sorted names or name endings; empty when `targets_regex`
    lora_dropout: float = 0.0
    use_rslora: bool = False
    task_type: str | None = None
    targets_regex: str | None = None  # kept as text and never run
    exclude_modules: tuple[str, ...] = ()
    excludes_regex: str | None = None  # kept as text and never run
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    use_dora: bool = False
    bias: str = "none"  # or the biases of the base that were trained: all, or lora_only
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()  # trained in full
    ensure_weight_tying: bool = False  # `with_ties` writes out what it means
    # ids of the tokens with embeddings of their own, or embed_tokens and lm_head → ids
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "AdapterConfig":
        """Read a LoraConfig as peft writes it. Raises Refused with every problem in it."""
        if problems := check_config(raw):
            raise Refused.because(problems)
        targets, excludes = raw["target_modules"], raw.get("exclude_modules")
        layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern")
        return cls(
            base_id=raw.get("base_model_name_or_path") or "",
            r=raw["r"],
            lora_alpha=_plain(raw["lora_alpha"]),
            target_modules=() if isinstance(targets, str) else tuple(sorted(set(targets))),
            lora_dropout=_plain(raw.get("lora_dropout", 0.0)),
            use_rslora=raw.get("use_rslora", False),
            task_type=raw.get("task_type"),
            targets_regex=targets if isinstance(targets, str) else None,
            exclude_modules=() if isinstance(excludes, str) else tuple(sorted(set(excludes or ()))),
            excludes_regex=excludes if isinstance(excludes, str) else None,
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            layers_pattern=tuple(n for n in _listed(patterns) if n),
            rank_pattern=_unescaped(raw.get("rank_pattern")),
            alpha_pattern={k: _plain(v) for k, v in _unescaped(raw.get("alpha_pattern")).items()},
            use_dora=raw.get("use_dora", False),
            bias=raw.get("bias", "none"),
            lora_bias=raw.get("lora_bias", False),
            modules_to_save=tuple(n for n in _listed(raw.get("modules_to_save")) if n),
            ensure_weight_tying=raw.get("ensure_weight_tying", False),
            token_indices=_token_indices(raw.get("trainable_token_indices")),
        )

    @property
    def peft_type(self) -> str:
        return "LORA"

    @property
    def parts(self) -> frozenset[str]:
        """Return what the tensors may be, in the words of registry/parts.py."""
        also = {
            "magnitude": self.use_dora,
            "B_bias": self.lora_bias,
            "bias": self.bias != "none",
            "weight": bool(self.modules_to_save),
            "tokens": bool(self.token_indices),
        }
        return frozenset(("A", "B", *(part for part, used in also.items() if used)))

    @property
    def needed(self) -> frozenset[str]:
        """Return what every adapted module must have."""
        return self.parts & {"A", "B", "B_bias", "magnitude"}

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tokens with embeddings of their own, by the last name of their module."""
        if isinstance(self.token_indices, tuple):
            return {"embed_tokens": self.token_indices}
        return self.token_indices

    def rank(self, module: str) -> int:
        """Return the rank of one module, for example `model.layers.0.self_attn.q_proj`."""
        return first_match(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor before `B(A(x))` of one module."""
        alpha, rank = first_match(self.alpha_pattern, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Tell whether peft would put LoRA on this module. A regular expression says yes here."""
        if _ends_with(module, self.exclude_modules):
            return False
        if self.targets_regex is not None:
            return True
        if module in self.target_modules:
            return True  # peft: a full name counts whatever the layers are
        return _ends_with(module, self.target_modules) and self._in_layers(module)

    def saves(self, module: str) -> bool:
        """Tell whether peft would train this module in full: it compares how names end."""
        return module.endswith(self.modules_to_save)

    @property
    def ties(self) -> bool:
        """Tell whether peft trains embedding and head as one where the base has one for both."""
        return self.ensure_weight_tying and any(map(_is_matrix, self.modules_to_save))

    def with_ties(self) -> "AdapterConfig":
        """Name both, as peft saves both of one that `ties` on a base whose head is its embedding.

        Without `ensure_weight_tying` peft then reads the same numbers into one copy for each.
        """
        others = (name for name in self.modules_to_save if not _is_matrix(name))
        return replace(self, modules_to_save=(*others, *MATRICES), ensure_weight_tying=False)

    def resolved(self, base_id: str, modules: Collection[str]) -> "AdapterConfig":
        """Name the base by its logical id and write out what was not a plain list of names."""
        plain = replace(self, base_id=base_id, ensure_weight_tying=False)
        indirect = self.targets_regex is not None or self.excludes_regex is not None
        if not (indirect or self.exclude_modules or self.layers_to_transform):
            return plain
        return replace(
            plain,
            target_modules=tuple(sorted(modules)),
            targets_regex=None,
            exclude_modules=(),
            excludes_regex=None,
            layers_to_transform=(),
            layers_pattern=(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration for `PeftModel.from_pretrained`, in a fixed order."""
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_id,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": list(self.target_modules),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": self.bias,
            **{name: value for name, value in self._beside.items() if value},
        }

    @property
    def _beside(self) -> dict[str, Any]:
        """Return the fields that plain LoRA leaves out: its digests are to stay what they were."""
        ids = self.token_indices
        tokens = list(ids) if isinstance(ids, tuple) else dict(ids)
        return {
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "modules_to_save": list(self.modules_to_save),
            "trainable_token_indices": tokens,
        }

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        # As peft 0.21 reads them (check_target_module_exists); the first pattern that matches wins.
        before = [rf"(?:^|.*?\.){re.escape(name)}" for name in self.layers_pattern]
        for pattern in before or [r".*?\.[^.]*"]:
            if match := re.match(rf"{pattern}\.(\d+)\.", module):
                return int(match[1]) in self.layers_to_transform
        return False


def first_match(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first pattern that is the module or an ending of it at a dot.

    The rule is peft's get_pattern_key, `(.*\\.)?(key)$` with the first match winning. Keys are
    names (registry/config.py refuses others), so no expression of a stranger is ever run.
    """
    if not patterns:
        return default
    ends = {*endings(module), f"^{module}"}
    found = [key for key in ends if key in patterns]
    if len(found) > 1:
        found = [next(key for key in patterns if key in ends)]
    return patterns[found[0]] if found else default


def _ends_with(module: str, names: Collection[str]) -> bool:
    return bool(names) and not endings(module).isdisjoint(names)


def endings(module: str) -> set[str]:
    """Return a name and what follows each of its dots, as peft compares names with."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _is_matrix(name: str) -> bool:
    return name.rpartition(".")[2] in [matrix.rpartition(".")[2] for matrix in MATRICES]


def _plain(number: float) -> float:
    """Write 16.0 as 16, so that equal adapters have equal digests."""
    return int(number) if number == int(number) else number


def _token_indices(
    value: list[int] | dict[str, list[int]] | None,
) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    if isinstance(value, dict):
        return {name: tuple(ids) for name, ids in sorted(value.items())}
    return tuple(value or ())


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _unescaped(patterns: dict[str, Number] | None) -> dict[str, Number]:
    return {plain_key(key): value for key, value in (patterns or {}).items()}
