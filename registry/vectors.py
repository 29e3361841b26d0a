"""The configuration of adapters that are vectors only, without any LoRA."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from registry.config import (
    Check,
    inert,
    layer_names,
    module_names,
    one_of,
    short_text,
    target_names,
    token_ids,
    whole,
)
from registry.errors import Refused
from registry.lora import AdapterConfig
from registry.parts import MAX_VIRTUAL, Parts


def _some_names(value: object) -> str | None:
    return None if value == [] else module_names(value)


_COMMON: dict[str, Check] = {
    "task_type": one_of(None, "CAUSAL_LM"),
    "base_model_name_or_path": short_text,
    "revision": short_text,
    "peft_version": short_text,
    "inference_mode": one_of(True, False),
    "auto_mapping": one_of(None),
}
_TARGETS: dict[str, Check] = {
    "target_modules": target_names,
    "exclude_modules": module_names,
    "modules_to_save": one_of(None),
    "init_weights": inert,
    "layers_pattern": layer_names,
}
_SIZES = dict.fromkeys(
    ("num_attention_heads", "num_layers", "num_virtual_tokens", "token_dim"), whole(1, 1 << 20)
)
_PROMPT: dict[str, Check] = {
    **_SIZES,
    "num_virtual_tokens": whole(1, MAX_VIRTUAL),
    "num_transformer_submodules": one_of(1),
    "modules_to_save": one_of(None),
}
# peft type → the parts its tensors are, and the fields of its configuration
_TYPES: dict[str, tuple[Collection[str], Mapping[str, Check]]] = {
    "IA3": (
        ("scale",),
        _TARGETS
        | {
            "feedforward_modules": _some_names,
            "fan_in_fan_out": one_of(False),
            "init_ia3_weights": inert,
        },
    ),
    "BEFT": (("shift",), _TARGETS),
    "LN_TUNING": (("weight", "bias"), _TARGETS),
    "TRAINABLE_TOKENS": (
        ("tokens",),
        {"target_modules": short_text, "token_indices": token_ids, "init_weights": inert},
    ),
    "PROMPT_TUNING": (
        ("prompt",),
        _PROMPT
        | dict.fromkeys(
            ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs"), inert
        )
        | {"tokenizer_name_or_path": inert},
    ),
    "P_TUNING": (
        ("prompt",),
        _PROMPT
        | dict.fromkeys(
            (
                *("encoder_dropout", "encoder_hidden_size", "encoder_num_layers"),
                "encoder_reparameterization_type",
            ),
            inert,
        ),
    ),
    "PREFIX_TUNING": (
        ("prompt",),
        _PROMPT
        | dict.fromkeys(("encoder_hidden_size", "init_weights", "prefix_projection"), inert),
    ),
    "CARTRIDGE": (("prompt",), _PROMPT | {"num_frozen_tokens": inert}),
}
VECTOR_TYPES = tuple(_TYPES)
_KEPT = (*_SIZES, "num_transformer_submodules", "token_indices")


@dataclass(frozen=True, slots=True)
class VectorConfig:
    """What of an `adapter_config.json` peft needs to load vectors; they speak for themselves."""

    peft_type: str
    base_id: str
    task_type: str | None
    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "VectorConfig":
        """Read a configuration as peft writes it. Raises Refused with every problem in it."""
        kind = raw["peft_type"]
        checks = _COMMON | dict(_TYPES[kind][1])
        problems = [
            ("config_unknown_field", f"adapter_config.json has the field {key[:60]!r}: not known.")
            for key in raw.keys() - checks.keys() - {"peft_type"}
        ]
        problems += [
            ("config_invalid", f"{key}={str(raw[key])[:80]}: {fault}.")
            for key, check in checks.items()
            if key in raw and (fault := check(raw[key]))
        ]
        needed = {"token_indices"} if kind == "TRAINABLE_TOKENS" else set[str]()
        problems += [
            ("config_invalid", f"adapter_config.json has no field {key!r}.")
            for key in needed - raw.keys()
        ]
        if problems:
            raise Refused.because(problems)
        names = ("target_modules", "feedforward_modules")
        kept = {key: raw[key] for key in (*names, *_KEPT) if key in raw}
        return cls(kind, raw.get("base_model_name_or_path") or "", raw.get("task_type"), kept)

    @property
    def parts(self) -> Collection[str]:
        return _TYPES[self.peft_type][0]

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Return the tokens with embeddings of their own, by the last name of their module."""
        ids = tuple(self.fields.get("token_indices", ()))
        return {"embed_tokens": ids, "lm_head": ids}

    def resolved(self, base_id: str, parts: Parts[Any]) -> "VectorConfig":
        """Name the base by its logical id, and write the names of the modules out."""
        fields = dict(self.fields)
        if "target_modules" in fields and self.peft_type != "TRAINABLE_TOKENS":
            fields["target_modules"] = sorted(parts)
        if self.peft_type == "IA3":
            fields["feedforward_modules"] = sorted(
                module for module, own in parts.items() if own["scale"].shape[0] == 1
            )
        return replace(self, base_id=base_id, fields=fields)

    def to_json(self) -> dict[str, Any]:
        """Return the resolved configuration for `PeftModel.from_pretrained`, in a fixed order."""
        return {
            "peft_type": self.peft_type,
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_id,
            "inference_mode": True,
            **dict(sorted(self.fields.items())),
        }


AnyConfig = AdapterConfig | VectorConfig


def parse_config(raw: dict[str, Any]) -> AnyConfig:
    """Read an `adapter_config.json` of any type that can be worn. Raises Refused."""
    return (VectorConfig if raw.get("peft_type") in VECTOR_TYPES else AdapterConfig).parse(raw)
