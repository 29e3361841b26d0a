"""The tensors of an adapter: which module each belongs to, what it does there, and its shape.

Beside the A and B of LoRA an adapter may have vectors: for the outputs of a linear, in the place of
a norm's weight, for the embeddings of some tokens, or for positions before the prompt. It may have
an embedding or a head of its own, as large as the base's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from registry.architectures import EMBEDDINGS, LLAMA_FAMILY, name_in_peft, read_base_config
from registry.base import BaseModel
from registry.errors import Problem
from registry.tensors import Tensor, read_chunks, read_folder

T = TypeVar("T")
Parts = Mapping[str, Mapping[str, T]]  # module → part → tensor; module "": the whole adapter

# part → how the names of its tensors end
ENDINGS = {
    "A": r"lora_A\.weight",
    "B": r"lora_B\.weight",
    "B_bias": r"lora_B\.bias",
    "magnitude": r"lora_magnitude_vector",
    # peft wraps the modules that it adapts, and only those
    "bias": r"(?:(?:base_layer|ln_tuning_layers)\.)?bias",
    "scale": r"ia3_l",
    "shift": r"beft_bias",
    "weight": r"(?:ln_tuning_layers\.)?weight",
    "tokens": r"(?:token_adapter\.)?trainable_tokens_delta",
}
PROMPT = "prompt_embeddings"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MATRICES = (EMBEDDING, HEAD)  # which may be trained in full; a tied base has one for both
NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # of the Llama family
MAX_VIRTUAL = 1024  # positions before a prompt

_NAME = re.compile(
    r"base_model\.model\.([A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30}?)\.(?:"
    + "|".join(f"(?P<{part}>{ending})" for part, ending in ENDINGS.items())
    + ")"
)


def sort_parts(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return module → part → tensor; tensors of other names are left out."""
    parts: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        if name == PROMPT:
            parts[""] = {"prompt": tensor}
        elif len(name) <= 300 and (match := _NAME.fullmatch(name)):
            parts.setdefault(match[1], {})[str(match.lastgroup)] = tensor
    return parts


@dataclass(frozen=True, slots=True)
class _Base:
    """What of a base model parts are checked against."""

    id: str
    kind: str  # model_type
    hidden: int
    linears: Mapping[str, tuple[int, int]]  # module → (out, in)
    tensors: Mapping[str, tuple[int, ...]]  # name, as PEFT has it, → shape

    @classmethod
    def of(cls, model: BaseModel) -> "_Base":
        config = read_base_config(model.path)
        kind = config.get("model_type", "")
        tensors = {
            name_in_peft(name, kind): tensor.shape
            for name, tensor in read_folder(model.path).items()
        }
        hidden = config.get("hidden_size", config.get("n_embd", 0))
        return cls(model.id, kind, hidden, model.linears, tensors)

    def shape(self, module: str) -> tuple[int, ...] | None:
        return self.tensors.get(f"{module}.weight")

    @property
    def embedding(self) -> tuple[int, ...]:
        return self.tensors[f"{EMBEDDINGS.get(self.kind, EMBEDDING)}.weight"]

    def is_norm(self, module: str) -> bool:
        """Tell whether rows can have a norm of their own there."""
        if self.kind in LLAMA_FAMILY and module.rpartition(".")[2] not in NORMS:
            return False
        return self.shape(module) == (self.hidden,)


def check_parts(
    parts: Parts[Tensor], tokens: Mapping[str, tuple[int, ...]], kind: str, model: BaseModel
) -> list[Problem]:
    """Return what is wrong with everything but A and B.

    `tokens` are the ids of the tokens with embeddings, by the last name of their module; `kind` is
    the peft type.
    """
    vectors = {
        (module, part): tensor
        for module, own in parts.items()
        for part, tensor in own.items()
        if part not in "AB"
    }
    if not vectors:
        return []
    base = _Base.of(model)
    problems: list[Problem] = []
    for (module, part), tensor in sorted(vectors.items()):
        if part in ("B_bias", "magnitude", "bias", "scale", "shift"):
            problems += _check_outputs(module, part, tensor, base)
        elif part == "weight":
            problems += _check_weight(module, tensor, base)
        elif part == "tokens":
            problems += _check_tokens(module, tensor, tokens, base)
        else:
            problems += _check_prompt(tensor, kind, base)
    return problems + _check_twice(parts, model)


def _check_outputs(module: str, part: str, tensor: Tensor, base: _Base) -> list[Problem]:
    is_norm = part == "bias" and base.is_norm(module)
    if module.rpartition(".")[2] == HEAD:
        text = f"{tensor.name}: vectors of the output head are not servable."
        return [("part_unsupported", text)]
    if module not in base.linears and not is_norm:
        return [("module_not_in_base", f"{module} is no linear layer of {base.id}.")]
    if part == "bias" and f"{module}.bias" not in base.tensors:
        text = f"{tensor.name}: {base.id} has no bias there."
        return [("module_not_in_base", text)]
    if is_norm:
        return _check_shape(tensor, (base.hidden,))
    out, into = base.linears[module]
    if part == "scale" and tensor.shape == (1, into):
        if _is_down(module, base):
            return []
        text = f"{tensor.name}: scaled inputs are served for mlp.down_proj only."
        return [("part_unsupported", text)]
    wanted = {"scale": (out, 1), "shift": (1, out)}.get(part, (out,))
    return _check_shape(tensor, wanted)


def _is_down(module: str, base: _Base) -> bool:
    """Tell whether what a linear reads is a product of what two others give."""
    mlp, _, last = module.rpartition(".")
    gated = {f"{mlp}.gate_proj", f"{mlp}.up_proj"} <= base.linears.keys()
    return gated and last == "down_proj" and mlp.endswith(".mlp")


def _check_weight(module: str, tensor: Tensor, base: _Base) -> list[Problem]:
    if module in MATRICES:
        return _check_matrix(module, tensor, base)
    found = base.shape(module)
    if found is None:
        return [("module_not_in_base", f"{tensor.name}: the base has no {module}.")]
    if not base.is_norm(module):
        served = "norms of whole layers"
        if base.kind not in EMBEDDINGS:
            served += ", the embedding and the head"
        reason = f"{served} are served as trained in full, other matrices are not"
        text = f"{tensor.name}: {reason}; train LoRA on linear layers."
        return [("part_unsupported", text)]
    return _check_shape(tensor, found)


def _check_matrix(module: str, tensor: Tensor, base: _Base) -> list[Problem]:
    if problems := _check_place(module, tensor, base):
        return problems
    wanted = base.embedding
    if len(tensor.shape) == 2 and tensor.shape[0] != wanted[0]:
        text = (
            f"{tensor.name} has {tensor.shape[0]} rows, and the base {wanted[0]} tokens: a resized "
            "vocabulary is not servable. Train without resizing it, new tokens in the place of "
            "tokens that the base does not use."
        )
        return [("shape_mismatch", text)]
    return _check_shape(tensor, wanted)


def _check_place(module: str, tensor: Tensor, base: _Base) -> list[Problem]:
    """Tell why rows cannot have an embedding or a head of their own."""
    if base.kind in EMBEDDINGS:
        reason = f"an embedding or a head of its own is not served on bases of {base.kind!r}"
    elif module == HEAD and f"{HEAD}.bias" in base.tensors:
        reason = "a head with a bias is not servable as trained"
    else:
        return []
    return [("part_unsupported", f"{tensor.name}: {reason}; train LoRA on linear layers.")]


def is_tied(model: BaseModel) -> bool:
    """Tell whether the head of a base is its embedding."""
    said = read_base_config(model.path).get("tie_word_embeddings")
    return bool(said) or f"{HEAD}.weight" not in read_folder(model.path)


def check_one(parts: Parts[Tensor]) -> list[Problem]:
    """Return what is wrong with embedding and head that were trained as one.

    Everything else about them must have been checked.
    """
    embedding, head = (parts[module]["weight"] for module in MATRICES)
    pieces = zip_longest(read_chunks(embedding), read_chunks(head))
    if embedding.dtype == head.dtype and all(one == other for one, other in pieces):
        return []
    text = (
        f"ensure_weight_tying=True, but {head.name} is not {embedding.name}: peft loads only one. "
        "Save the adapter with peft again."
    )
    return [("config_invalid", text)]


def _check_twice(parts: Parts[Tensor], model: BaseModel) -> list[Problem]:
    trained = {module for module in MATRICES if "tokens" in parts.get(module, {})}
    if EMBEDDING in trained and is_tied(model):
        trained.add(HEAD)
    return [
        ("config_invalid", f"{module} is trained in full and by its tokens; peft loads only one.")
        for module in sorted(trained)
        if "weight" in parts.get(module, {})
    ]


def _check_tokens(
    module: str, tensor: Tensor, tokens: Mapping[str, tuple[int, ...]], base: _Base
) -> list[Problem]:
    vocab, hidden = base.embedding
    ids = tokens.get(module.rpartition(".")[2]) if module in MATRICES else None
    if problems := _check_place(module, tensor, base):
        return problems
    if ids is None:
        return [("unknown_key", f"{tensor.name}: the config names no tokens for it.")]
    if len(set(ids)) != len(ids) or not all(0 <= each < vocab for each in ids):
        text = f"The token ids of {tensor.name} must be different, and below {vocab}."
        return [("config_invalid", text)]
    return _check_shape(tensor, (len(ids), hidden))


def _check_prompt(tensor: Tensor, kind: str, base: _Base) -> list[Problem]:
    width = base.embedding[1]
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):
        cached = (".k_proj", ".v_proj")
        width = sum(out for module, (out, _) in base.linears.items() if module.endswith(cached))
        if not width:
            text = f"{tensor.name}: keys and values of {base.kind!r} come from no k_proj and v_proj"
            return [("part_unsupported", f"{text}, and such a prefix is not servable there.")]
    if len(tensor.shape) == 2 and not 0 < tensor.shape[0] <= MAX_VIRTUAL:
        text = f"{tensor.name} has {tensor.shape[0]} positions, the limit is {MAX_VIRTUAL}."
        return [("too_large", text)]
    return _check_shape(tensor, (tensor.shape[0] if tensor.shape else 0, width))


def _check_shape(tensor: Tensor, wanted: tuple[int, ...]) -> list[Problem]:
    problems: list[Problem] = []
    if tensor.dtype not in ("F32", "F16", "BF16"):
        text = f"{tensor.name} is {tensor.dtype}; save it as F32, F16 or BF16."
        problems.append(("dtype_unsupported", text))
    if tensor.shape != wanted:
        text = f"{tensor.name}: has the shape {list(tensor.shape)}, {list(wanted)} is wanted."
        problems.append(("shape_mismatch", text))
    return problems
