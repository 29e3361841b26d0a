"""Which fields of `adapter_config.json` are understood, and which values of them can be served.

The fields are those of LoraConfig in peft 0.21. A field that is not listed here is refused by
name: peft itself drops unknown fields with a warning and then computes something else.
"""

import re
from collections.abc import Callable
from typing import Any, cast

from registry.errors import Problem

Check = Callable[[object], str | None]  # of one field: what is wrong with it, None if nothing

MAX_RANK = 256
MAX_PATTERNS = 4096
MAX_NAMES = 4096
MAX_TOKENS = 4096  # with embeddings of their own
MAX_LAYER_NAMES = 16  # each is looked for in every module, as a regular expression
MODULE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
# Module names only, perhaps anchored: nothing here can backtrack.
PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(\\?\.[A-Za-z0-9_]+)*")

# These initialisations change the base weights, so A and B alone mean something else.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")
PLAIN_INIT = ("gaussian", "eva", "orthogonal", "mica")

_MULTIPLIES = "it multiplies the base's weights: the change has full rank and needs them"
_DERIVES = "its change is computed from the base's own weights"
_SPREADS = "its change has full rank by design"
_ROUTES = "it mixes several adapters by what it reads"
_RUNS = "it puts a network of its own beside the layers"

# peft type → why it cannot be worn. Those that can are LORA and those in forms.py and vectors.py.
REFUSED_TYPES = {
    **dict.fromkeys(("OFT", "BOFT", "HRA", "ROAD", "HIRA", "GLORA"), _MULTIPLIES),
    **dict.fromkeys(("PSOFT", "TINYLORA", "ADAMSS", "OSF", "DEFT", "FROD", "PEANUT"), _DERIVES),
    **dict.fromkeys(("FOURIERFT", "WAVEFT", "C3A", "SHIRA", "RANDLORA", "SUPERTUNING"), _SPREADS),
    **dict.fromkeys(("XLORA", "POLY", "LILY"), _ROUTES),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW"), _RUNS),
    "MULTITASK_PROMPT_TUNING": "it learns a prompt for each of several tasks; requests name none",
    "UNILORA": "its indices are not saved but drawn again by torch when it is loaded",
    "PVERA": "it draws its change at random",
    "CPT": "not servable yet",
}

# field → (values that mean "not used", why any other value is refused)
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "layer_replication": ((None, []), "replicated layers are not servable"),
    "target_parameters": (
        (None, []),
        "LoRA on bare parameters (mixture of experts) is not servable yet; use target_modules",
    ),
    "alora_invocation_tokens": ((None, []), "activated LoRA is not servable yet"),
    "use_qalora": ((False,), "QALoRA is not servable yet"),
    "use_bdlora": ((None, False), "BD-LoRA is not servable yet"),
    "arrow_config": ((None,), "Arrow routing is not servable"),
    "kasa_config": ((None,), "KaSA changes the base weights and is not servable"),
    "velora_config": ((None,), "VeLoRA is not servable yet"),
    "monteclora_config": ((None,), "MonteCLoRA is not servable"),
    "megatron_config": ((None,), "it imports code; adapters may not"),
    "megatron_core": ((None, "megatron.core"), "it names a module to import; adapters may not"),
    "auto_mapping": (
        (None,),
        "it names code to import; set it to null (train with task_type='CAUSAL_LM')",
    ),
    "runtime_config": ((None,), "it belongs to a running process, not to a file"),
    "corda_config": ((None,), "it opens files and changes the base weights; convert as below"),
    "lora_ga_config": ((None,), "it opens files and changes the base weights; convert as below"),
    "loftq_config": ((None, {}), "it changes the base weights; convert as below"),
    "eva_config": ((None, {}), "it is only needed while training; set it to null"),
}


def check_config(raw: dict[str, Any]) -> list[Problem]:
    """Return every reason why this LoraConfig cannot be served; empty when it can."""
    problems = [
        ("config_unknown_field", f"adapter_config.json has the field {key[:60]!r}: not known here.")
        for key in raw
        if key not in CHECKS and key not in UNSUPPORTED
    ]
    for key, (unused, reason) in UNSUPPORTED.items():
        if key in raw and not any(_same(raw[key], value) for value in unused):
            problems.append((_code_of(key), f"{key}={shown(raw[key])}: {reason}."))
    for key, check in CHECKS.items():
        if key in raw and (fault := check(raw[key])):
            problems.append((_fault_code(key), f"{key}={shown(raw[key])}: {fault}."))
    problems += [
        ("config_invalid", f"adapter_config.json has no field {key!r}.")
        for key in ("peft_type", "r", "lora_alpha", "target_modules")
        if key not in raw
    ]
    return problems + _check_init(raw.get("init_lora_weights", True))


def _code_of(key: str) -> str:
    unsafe = key in ("megatron_config", "megatron_core", "auto_mapping", "runtime_config")
    return "unsafe_config_field" if unsafe else "config_unsupported"


def _fault_code(key: str) -> str:
    return "rank_invalid" if key in ("r", "rank_pattern") else "config_invalid"


def _check_init(init: object) -> list[Problem]:
    if isinstance(init, bool) or init in PLAIN_INIT:
        return []
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INIT):
        return [
            (
                "mutates_base",
                f"init_lora_weights={shown(init)} changed the base weights before training, so "
                "these tensors do not fit the unchanged base. Save it as a plain LoRA: "
                "model.save_pretrained(folder, path_initial_model_for_weight_conversion="
                "<folder of the adapter saved right after initialisation>).",
            )
        ]
    return [("config_invalid", f"init_lora_weights={shown(init)} is not an initialisation.")]


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _same(value: object, other: object) -> bool:
    """Compare so that 0 is not False and 1 is not True."""
    return type(value) is type(other) and value == other


def whole(low: int, high: int) -> Check:
    def check(value: object) -> str | None:
        fits = type(value) is int and low <= value <= high
        return None if fits else f"must be a whole number from {low} to {high}"

    return check


def positive(value: object) -> str | None:
    # NaN, infinity and integers too large for a float all fail the comparison.
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e6
    return None if fits else "must be a number above 0, 1e6 at most"


def _dropout(value: object) -> str | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return None if fits else "must be a number from 0 to 1"


def _patterns(check: Check) -> Check:
    def check_all(value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict):
            return "must map module names to numbers"
        patterns = cast("dict[str, object]", value)
        if len(patterns) > MAX_PATTERNS:
            return f"has {len(patterns)} entries, the limit is {MAX_PATTERNS}"
        for key, number in patterns.items():
            if len(key) > 200 or not PATTERN.fullmatch(key):
                return f"the key {key[:60]!r} is not a module name; write names out instead"
            if fault := check(number):
                return f"the value of {key!r} {fault}"
        if len({plain_key(key) for key in patterns}) < len(patterns):
            return "two of its keys mean the same modules"
        return None

    return check_all


def plain_key(key: str) -> str:
    """Write a key of a pattern without the escapes before its dots."""
    return key.replace("\\.", ".")


def module_names(value: object) -> str | None:
    """Accept null, one bounded regular expression (never run here), or a list of module names."""
    if value is None or (isinstance(value, str) and 0 < len(value) <= 4096):
        return None
    if not isinstance(value, list) or not 0 < len(cast("list[object]", value)) <= MAX_NAMES:
        return f"must be a list of 1 to {MAX_NAMES} module names"
    for name in cast("list[object]", value):
        if not isinstance(name, str) or len(name) > 200 or not MODULE.fullmatch(name):
            return f"{shown(name)} is not a module name"
    return None


def target_names(value: object) -> str | None:
    return "must name the modules that were trained" if value is None else module_names(value)


def token_ids(value: object) -> str | None:
    ids = cast("list[object]", value) if isinstance(value, list) else [None]
    fits = len(ids) <= MAX_TOKENS and all(type(each) is int and 0 <= each < 1 << 31 for each in ids)
    return None if fits else f"must be a list of at most {MAX_TOKENS} token ids"


def token_indices(value: object) -> str | None:
    """Accept null, token ids of the embedding, or of the embedding and the head by name."""
    if not isinstance(value, dict):
        return None if value is None else token_ids(value)
    by_name = cast("dict[str, object]", value)
    if by_name.keys() - {"embed_tokens", "lm_head"}:
        return "may name embed_tokens and lm_head"
    return next((fault for ids in by_name.values() if (fault := token_ids(ids))), None)


def inert(_: object) -> str | None:
    """Accept any value of a field that only training reads."""
    return None


def layer_names(value: object) -> str | None:
    names = cast("list[object]", value if isinstance(value, list) else [value])
    if names in ([], [None], [""]):
        return None
    fault = f"must be a list of at most {MAX_LAYER_NAMES} module names"
    return module_names(names) if len(names) <= MAX_LAYER_NAMES else fault


def _layers(value: object) -> str | None:
    layers: list[object] = [] if value is None else [value]
    if isinstance(value, list):
        layers = cast("list[object]", value)
    fits = len(layers) <= MAX_NAMES and all(type(n) is int and 0 <= n < 100_000 for n in layers)
    return None if fits else "must be layer numbers"


def one_of(*allowed: object) -> Check:
    names = ", ".join(repr(value) for value in allowed)

    def check(value: object) -> str | None:
        found = any(_same(value, item) for item in allowed)
        return None if found else f"must be one of {names} to be servable"

    return check


def short_text(value: object) -> str | None:
    fits = value is None or (isinstance(value, str) and len(value) <= 1024)
    return None if fits else "must be null or a text of at most 1024 characters"


def _peft_type(value: object) -> str | None:
    if value == "LORA":
        return None
    if not isinstance(value, str) or value not in REFUSED_TYPES:
        return "is no type of adapter that is known here"
    return f"{REFUSED_TYPES[value]}. Train LoRA, or load it with peft"


CHECKS: dict[str, Check] = {
    "peft_type": _peft_type,
    "task_type": one_of(None, "CAUSAL_LM"),
    "base_model_name_or_path": short_text,
    "revision": short_text,
    "peft_version": short_text,
    "inference_mode": one_of(True, False),
    "r": whole(1, MAX_RANK),
    "lora_alpha": positive,
    "lora_dropout": _dropout,
    "use_rslora": one_of(True, False),
    "use_dora": one_of(True, False),
    "bias": one_of("none", "all", "lora_only"),
    "lora_bias": one_of(True, False),
    "ensure_weight_tying": one_of(True, False),
    "modules_to_save": layer_names,
    "trainable_token_indices": token_indices,
    "target_modules": target_names,
    "exclude_modules": module_names,
    "layers_to_transform": _layers,
    "layers_pattern": layer_names,
    "rank_pattern": _patterns(whole(1, MAX_RANK)),
    "alpha_pattern": _patterns(positive),
    # How the base stores its weights, which peft itself sees; A and B are the same either way.
    "fan_in_fan_out": one_of(True, False),
    "init_lora_weights": inert,  # _check_init has its own codes
    "qalora_group_size": whole(1, 1 << 20),  # inert while use_qalora is false
}
