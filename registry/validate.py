"""The gate: may this folder become a version, and of which base model?

Everything is checked and every problem is told at once. Nothing here needs torch, runs code or
opens a path that a file names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from registry.base import BaseModel, Bases
from registry.card import CARD_NAME, MAX_CARD_BYTES, check_card, kind_of
from registry.config import MAX_RANK
from registry.contents import (
    ADAPTER,
    COMPANIONS,
    CONFIG_NAME,
    WEIGHTS_NAME,
    WHOLE,
    check_contents,
    identity_files,
)
from registry.errors import BaseMismatch, Problem, Refused, refused
from registry.jsonfile import read_object
from registry.lora import AdapterConfig, endings
from registry.parts import MATRICES, Parts, check_one, check_parts, is_tied, sort_parts
from registry.tensors import ADAPTER_BOUNDS, Tensor, largest_magnitudes, read_header
from registry.upload import ALLOWED
from registry.vectors import AnyConfig, VectorConfig, parse_config
from registry.whole import check_whole

T = TypeVar("T")
_MISFITS = ("shape_mismatch", "module_not_in_base", "base_mismatch")
_SUSPICIOUS = 1e4  # an absolute weight above this is no trained LoRA weight


@dataclass(frozen=True, slots=True)
class Checked:
    """A folder that passed the gate."""

    config: AnyConfig | None  # resolved: logical base id, plain names; None without an adapter
    card: dict[str, Any]
    base: BaseModel
    rank: int  # highest of any module, 0 without an adapter
    warnings: tuple[Problem, ...]


def validate(folder: Path, bases: Bases, *, base: str | None = None) -> Checked:
    """Check the files in `folder`, which must not change meanwhile.

    Raises Refused, or BaseMismatch when the adapter was made for another base model, with every
    problem found; BaseNotFound when the base model it names is not on this machine.
    """
    problems: list[Problem] = []
    names = [path.name for path in folder.iterdir()]
    found = identity_files(names)
    card = _collect(problems, lambda: read_card(folder))
    if card is not None and (wrong := check_contents(kind_of(card), found)):
        raise _refusal(wrong)
    if found != WHOLE:
        problems += [
            ("file_unexpected", f"{name} belongs to a whole model, not to an adapter: take it out.")
            for name in sorted(COMPANIONS.keys() & set(names))
        ]
    if found == ADAPTER:
        return _validate_adapter(folder, card, problems, bases, base)
    if card is None or problems:
        raise _refusal(problems)
    model = bases.get(base_id(None, card, base))
    problems += _check_structure(card, model)
    if found == WHOLE:
        problems += check_whole(folder, model)
    if problems:
        raise _refusal(problems)
    return Checked(None, card, model, 0, tuple(_weights_warning(card, model)))


def _validate_adapter(
    folder: Path,
    card: dict[str, Any] | None,
    problems: list[Problem],
    bases: Bases,
    base: str | None,
) -> Checked:
    """Check the two files of an adapter; `problems` has what is wrong with its card."""
    config = _collect(problems, lambda: _read_config(folder))
    tensors = _collect(problems, lambda: read_header(folder / WEIGHTS_NAME, ADAPTER_BOUNDS))
    parts = sort_parts(tensors or {})
    if tensors is not None:
        problems += _check_names(tensors, parts)
    if card is None or config is None or tensors is None:
        raise _refusal(problems)
    model = bases.get(base_id(config, card, base))
    as_read, config = config, _with_ties(config, model)
    problems += _check_structure(card, model)
    problems += _check_allowed(config, parts)
    problems += check_parts(_allowed(config, parts), config.tokens, config.peft_type, model)
    modules = {module for module, own in parts.items() if own.keys() >= {"A", "B"}}
    if isinstance(config, AdapterConfig):
        problems += _check_targets(config, modules)
        for module in sorted(modules):
            problems += _check_shapes(module, config, tensors, model)
    # Values are read last: only a file whose every size is right is worth a pass over its bytes.
    value_problems, warnings = ([], []) if problems else _check_values(folder, tensors)
    if config is not as_read and not problems:
        value_problems += check_one(parts)
    if problems := problems + value_problems:
        raise _refusal(problems)
    warnings += _base_warning(config, model)
    warnings += _weights_warning(card, model)
    if isinstance(config, VectorConfig):
        return Checked(config.resolved(model.id, parts), card, model, 0, tuple(warnings))
    warnings += _coverage_warning(config, modules, model)
    rank = max(config.rank(module) for module in modules)
    return Checked(config.resolved(model.id, modules), card, model, rank, tuple(warnings))


def _collect(problems: list[Problem], read: Callable[[], T]) -> T | None:
    """Run one reader; turn its refusal into problems, so that the other files are read as well."""
    try:
        return read()
    except Refused as error:
        problems += error.problems
        return None


def _refusal(problems: list[Problem]) -> Refused:
    misfit = any(code in _MISFITS for code, _ in problems)
    return (BaseMismatch if misfit else Refused).because(problems)


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card, empty when there is none. Raises Refused."""
    path = folder / CARD_NAME
    return check_card(read_object(path, MAX_CARD_BYTES)) if path.exists() else {}


def _read_config(folder: Path) -> AnyConfig:
    return parse_config(read_object(folder / CONFIG_NAME, ALLOWED[CONFIG_NAME]))


def _with_ties(config: AnyConfig, model: BaseModel) -> AnyConfig:
    if isinstance(config, AdapterConfig) and config.ties and is_tied(model):
        return config.with_ties()
    return config


def base_id(config: AnyConfig | None, card: dict[str, Any], given: str | None) -> str:
    """Decide the logical base id: the caller's, else the card's, else the config's."""
    recorded = cast("str", card.get("base", {}).get("id", ""))
    if given and recorded and given != recorded:
        text = f"The card says this adapter was made for {recorded!r}, not for {given!r}."
        raise BaseMismatch.because([("base_mismatch", text)])
    if chosen := given or recorded:
        return chosen
    named = config.base_id if config else ""
    if not named or _is_path(named):
        where = f"{CARD_NAME} has no base.id"
        if config:
            said = f"is the folder {named!r}" if named else "is empty"
            where = f"base_model_name_or_path in {CONFIG_NAME} {said}"
        text = (
            f"{where}, so the base model has no name here. Give the id that `wardrobe base list` "
            f"shows: --base ID, over HTTP ?base=ID, or base.id in {CARD_NAME}."
        )
        raise refused("base_unnamed", text)
    return named


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def _check_structure(card: dict[str, Any], model: BaseModel) -> list[Problem]:
    recorded = card.get("base", {}).get("structure", "")
    if not recorded or recorded == model.structure:
        return []
    text = (
        f"The adapter was made for a model of the structure {recorded[:12]}, "
        f"{model.id} here has {model.structure[:12]}."
    )
    return [("base_mismatch", text)]


def _check_names(tensors: dict[str, Tensor], parts: Parts[Tensor]) -> list[Problem]:
    known = {tensor.name for own in parts.values() for tensor in own.values()}
    problems = [
        ("unknown_key", f"{name[:120]!r} is no tensor that peft saves for an adapter.")
        for name in tensors
        if name not in known
    ]
    return problems if tensors else [("no_tensors", f"{WEIGHTS_NAME} holds no tensor.")]


def _check_allowed(config: AnyConfig, parts: Parts[Tensor]) -> list[Problem]:
    """Compare what the tensors are with what the config says was trained."""
    allowed = config.parts
    problems = [
        ("unknown_key", f"{tensor.name}: the config says nothing of such a tensor{_hint(module)}.")
        for module, own in parts.items()
        for part, tensor in own.items()
        if not _is_said(config, module, part)
    ]
    found = {part for own in parts.values() for part in own}
    problems += [
        ("tensor_missing", f"The config names {what}, and no tensor belongs to them.")
        for part, what in (("weight", "modules that were saved"), ("tokens", "tokens"))
        if part in allowed and part not in found
    ]
    if isinstance(config, AdapterConfig):
        problems += [
            ("tensor_missing", f"modules_to_save names {module}, and no tensor belongs to it.")
            for module in MATRICES
            if config.saves(module) and "weight" not in parts.get(module, {})
        ]
        needed = config.needed
        problems += [
            (
                "orphan",
                f"{module} has {', '.join(sorted(own))} without {', '.join(sorted(missing))}.",
            )
            for module, own in sorted(parts.items())
            if own.keys() & needed and (missing := needed - own.keys())
        ]
    return problems


def _hint(module: str) -> str:
    """Tell of what PEFT saves beside what was trained."""
    if not module.startswith(MATRICES):
        return ""
    return (
        "; PEFT adds it with save_embedding_layers=True, and by itself where the vocabulary was "
        "resized, which is not servable"
    )


def _allowed(config: AnyConfig, parts: Parts[Tensor]) -> Parts[Tensor]:
    return {
        module: {part: tensor for part, tensor in own.items() if _is_said(config, module, part)}
        for module, own in parts.items()
    }


def _is_said(config: AnyConfig, module: str, part: str) -> bool:
    if isinstance(config, AdapterConfig) and part in ("weight", "bias"):
        return config.saves(module) or (part == "bias" and part in config.parts)
    return part in config.parts


def _check_targets(config: AdapterConfig, modules: set[str]) -> list[Problem]:
    problems = [
        (
            "module_not_targeted",
            f"{module} has tensors, but by the config's target_modules, exclude_modules and "
            "layers_to_transform it has no adapter.",
        )
        for module in sorted(modules)
        if not config.targets(module)
    ]
    found = {ending for module in modules for ending in endings(module)}
    problems += [
        ("target_missing", f"target_modules names {target!r}, and no tensor belongs to it.")
        for target in config.target_modules
        if target not in found
    ]
    return problems


def _check_shapes(
    module: str, config: AdapterConfig, tensors: dict[str, Tensor], model: BaseModel
) -> list[Problem]:
    last = module.rsplit(".", 1)[-1]
    if last == "lm_head" or "embed" in last:
        text = f"{module}: LoRA on embeddings or lm_head is not servable yet."
        return [("module_unsupported", text)]
    if module not in model.linears:
        return [("module_not_in_base", f"{module} is no linear layer of {model.id}.")]
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"] for half in "AB")
    problems: list[Problem] = []
    for tensor in (a, b):
        if tensor.dtype not in ("F32", "F16", "BF16"):
            text = f"{tensor.name} is {tensor.dtype}; save it as F32, F16 or BF16."
            problems.append(("dtype_unsupported", text))
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            shape = list(tensor.shape)
            text = f"{tensor.name} has the shape {shape}; it looks like an ungathered shard."
            problems.append(("empty_tensor", text))
    if problems:
        return problems
    out, into = model.linears[module]
    rank = config.rank(module)
    if (a.shape[0], b.shape[1]) != (rank, rank) or not 1 <= rank <= MAX_RANK:
        text = f"{module}: the config says rank {rank}, A has {a.shape[0]} and B has {b.shape[1]}."
        problems.append(("rank_mismatch", text))
    if (b.shape[0], a.shape[1]) != (out, into):
        text = f"{module}: made for {[b.shape[0], a.shape[1]]}, {model.id} has {[out, into]}."
        problems.append(("shape_mismatch", text))
    return problems


def _check_values(folder: Path, tensors: dict[str, Tensor]) -> tuple[list[Problem], list[Problem]]:
    """Read every value once. Returns problems and warnings."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    any_b = False
    for tensor, largest in largest_magnitudes(folder / WEIGHTS_NAME, tensors.values()):
        if not np.isfinite(largest):
            problems.append(("non_finite", f"{tensor.name} holds NaN or infinity."))
        elif largest > _SUSPICIOUS:
            text = f"{tensor.name} holds the value ±{largest:.3g}, large for a LoRA weight."
            warnings.append(("suspicious_scale", text))
        any_b = any_b or (largest != 0 and ".lora_A." not in tensor.name)
    if not any_b:
        warnings.append(("noop_adapter", "Every lora_B is zero: the adapter changes nothing."))
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        warnings.append(("mixed_dtypes", "The tensors have different dtypes."))
    return problems, warnings


def _base_warning(config: AnyConfig, model: BaseModel) -> list[Problem]:
    """Say that the caller's word, or the card's, went before what PEFT wrote down."""
    named = config.base_id
    if not named or _is_path(named) or named == model.id:
        return []
    text = f"{CONFIG_NAME} says that the adapter was made for {named!r}, not for {model.id!r}."
    return [("base_differs", text)]


def _weights_warning(card: dict[str, Any], model: BaseModel) -> list[Problem]:
    recorded = card.get("base", {}).get("fingerprint", "")
    if not recorded or recorded == model.fingerprint:
        return []
    text = (
        f"The adapter was made for other weights of {model.id} (fingerprint {recorded[:12]}, "
        f"here {model.fingerprint[:12]}): its answers may be worse than measured."
    )
    return [("base_weights_differ", text)]


def _coverage_warning(config: AdapterConfig, modules: set[str], model: BaseModel) -> list[Problem]:
    if config.targets_regex is not None or config.excludes_regex is not None:
        text = "A regular expression in the config was replaced by the names of the modules."
        return [("targets_written_out", text)]
    missing = [name for name in model.linears if config.targets(name) and name not in modules]
    if not missing:
        return []
    text = f"{len(missing)} targeted modules have no tensors, for example {missing[0]}."
    return [("partial_coverage", text)]
