"""A pushed adapter of another PEFT type that is exactly a LoRA is stored as that LoRA."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file  # type: ignore[reportUnknownVariableType]  # PathLike of what

from registry.base import BaseModel, Bases
from registry.config import MAX_RANK
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.errors import Problem, Refused, refused
from registry.forms import FORMS, Form
from registry.jsonfile import read_object
from registry.lora import AdapterConfig
from registry.manifest import config_bytes
from registry.tensors import ADAPTER_BOUNDS, Tensor, read_array, read_header
from registry.upload import ALLOWED
from registry.validate import base_id, read_card

LORA_TYPES = frozenset(("LORA", *FORMS))  # modules are named as LoRA does it
MAX_BYTES = 1 << 30  # of the LoRA, which is made in memory
_MODULE = r"base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})\."


@dataclass(frozen=True, slots=True)
class Module:
    """One module of the adapter: the tensors it reads, and the rank its LoRA will have."""

    name: str
    tensors: Mapping[str, Tensor]  # by the names of Form.pieces and Form.shared
    out: int
    into: int
    rank: int

    @property
    def size_bytes(self) -> int:
        return 4 * self.rank * (self.out + self.into)


def convert(folder: Path, bases: Bases, *, base: str | None = None) -> Problem | None:
    """Replace an adapter in `folder` by the LoRA that it is, in float32; tell what was done.

    None: it is no adapter of one of the types in FORMS, and nothing was touched. Reads `folder` and
    raises as `validate` does, which is to check the result.
    """
    path = folder / CONFIG_NAME
    raw = read_object(path, ALLOWED[CONFIG_NAME]) if path.exists() else {}
    form = FORMS.get(str(raw.get("peft_type")))
    if form is None or not (folder / WEIGHTS_NAME).exists():
        return None
    config = _parse(raw, form)
    model = bases.get(base_id(config, read_card(folder), base))
    modules = _modules(read_header(folder / WEIGHTS_NAME, ADAPTER_BOUNDS), form, config, model)
    size = sum(module.size_bytes for module in modules)
    if size > MAX_BYTES:
        text = f"As a LoRA it has {size:,} bytes, the limit is {MAX_BYTES:,}. Train fewer modules."
        raise refused("too_large", text)
    save_file(dict(_weights(modules, form, raw, config)), folder / WEIGHTS_NAME)
    path.write_bytes(config_bytes(_plain_config(config, modules)))
    rank = max(module.rank for module in modules)
    return ("converted", f"{form.title} was stored as the LoRA that it is, of rank {rank}.")


def parse_lora(raw: dict[str, Any]) -> AdapterConfig | None:
    """Read the configuration of a LoRA, or of what becomes one; None: of another type."""
    if raw.get("peft_type") == "LORA":
        return AdapterConfig.parse(raw)
    form = FORMS.get(str(raw.get("peft_type")))
    return None if form is None else _parse(raw, form)


def _parse(raw: dict[str, Any], form: Form) -> AdapterConfig:
    """Read the configuration by LoRA's own rules, but for the fields of its type."""
    problems = [
        ("config_invalid", f"{key}={str(raw[key])[:80]}: {fault}.")
        for key, check in form.fields.items()
        if key in raw and (fault := check(raw[key]))
    ]
    plain = {key: value for key, value in raw.items() if key not in form.fields}
    if form.alpha is not None and form.alpha in plain:
        plain["lora_alpha"] = plain.pop(form.alpha)
    try:
        config = AdapterConfig.parse({"lora_alpha": plain.get("r")} | plain | {"peft_type": "LORA"})
    except Refused as error:
        raise Refused.because([*problems, *error.problems]) from error
    if config.parts != frozenset(("A", "B")):
        text = f"{form.title} is served without biases, saved modules and trained tokens."
        problems.append(("config_unsupported", text))
    if problems:
        raise Refused.because(problems)
    return config


def _modules(
    tensors: dict[str, Tensor], form: Form, config: AdapterConfig, model: BaseModel
) -> list[Module]:
    """Sort the tensors by module and check every size against the base before any is read."""
    pattern = re.compile(_MODULE + f"({'|'.join(map(re.escape, form.pieces))})")
    shared = {
        name: tensors[f"base_model.{name}"]
        for name in form.shared
        if f"base_model.{name}" in tensors
    }
    pieces: dict[str, dict[str, Tensor]] = {}
    problems: list[Problem] = [
        ("tensor_missing", f"base_model.{name} is missing.")
        for name in form.shared.keys() - shared.keys()
    ]
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            pieces.setdefault(match[1], {})[match[2]] = tensor
        elif name.removeprefix("base_model.") not in shared:
            problems.append(("unknown_key", f"{name[:120]!r} is no tensor of {form.title}."))
    if not pieces:
        problems.append(("no_tensors", f"{WEIGHTS_NAME} holds no tensor of a module."))
    if problems:
        raise Refused.because(problems)
    found: list[Module] = []
    for name, own in sorted(pieces.items()):
        try:
            found.append(_module(name, own | shared, form, config, model))
        except Refused as error:
            problems += error.problems
    if problems:
        raise Refused.because(problems)
    # AdaLoRA leaves modules without any rank.
    if kept := [module for module in found if module.rank]:
        return kept
    raise refused("no_tensors", "No module has a rank above 0.")


def _module(
    name: str, tensors: dict[str, Tensor], form: Form, config: AdapterConfig, model: BaseModel
) -> Module:
    if not config.targets(name):
        text = f"{name} is not among the config's target_modules."
        raise refused("module_not_targeted", text)
    if name not in model.linears:
        raise refused("module_not_in_base", f"{name} is no linear layer of {model.id}.")
    if tensors.keys() - form.shared.keys() not in (form.variants or (form.pieces.keys(),)):
        found = ", ".join(sorted(tensors.keys() - form.shared.keys()))
        raise refused("tensor_missing", f"{name}: {form.title} is not complete with {found} alone.")
    out, into = model.linears[name]
    sizes = {"out": out, "in": into, "1": 1}
    for piece, tensor in tensors.items():
        letters = form.pieces.get(piece) or form.shared[piece]
        _bind(name, tensor, letters.split(), sizes)
    rank = form.rank(sizes)
    if isinstance(rank, str):
        raise refused("shape_mismatch", f"{name}: {rank}, {model.id} has {[out, into]}.")
    if rank > MAX_RANK:
        raise refused(
            "rank_invalid",
            f"{name}: as a LoRA {form.title} has rank {rank} there, the highest is {MAX_RANK}. "
            "Train a lower rank, or plain LoRA.",
        )
    return Module(name, tensors, out, into, rank)


def _bind(module: str, tensor: Tensor, letters: list[str], sizes: dict[str, int]) -> None:
    """Compare a shape with its letters; a new letter takes the size it stands for."""
    shape = tensor.shape
    if len(shape) != len(letters):
        text = f"{tensor.name} has the shape {list(shape)}, {len(letters)} sizes are expected."
        raise refused("shape_mismatch", text)
    for letter, size in zip(letters, shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise refused(
                "shape_mismatch",
                f"{tensor.name}: has the shape {list(shape)}, {module} needs "
                f"{[sizes.get(each, '?') for each in letters]}.",
            )


def _weights(
    modules: list[Module], form: Form, raw: dict[str, Any], config: AdapterConfig
) -> Iterator[tuple[str, Any]]:
    shared = {name: read_array(modules[0].tensors[name]) for name in form.shared}
    for module in modules:
        own = {
            name: read_array(module.tensors[name]) for name in form.pieces if name in module.tensors
        }
        a, b = form.factors(own | shared, raw | {"in": module.into, "out": module.out})
        scale = config.scale(module.name) if form.alpha else 1.0
        yield f"base_model.model.{module.name}.lora_A.weight", a
        yield f"base_model.model.{module.name}.lora_B.weight", b * a.dtype.type(scale)


def _plain_config(config: AdapterConfig, modules: list[Module]) -> AdapterConfig:
    """Write modules and ranks out; alpha is the rank, so that the scale is 1."""
    most = max(module.rank for module in modules)
    others = {module.name: module.rank for module in modules if module.rank != most}
    return AdapterConfig(
        base_id=config.base_id,
        r=most,
        lora_alpha=most,
        target_modules=tuple(module.name for module in modules),
        task_type=config.task_type,
        rank_pattern=others,
        alpha_pattern=others,
    )
