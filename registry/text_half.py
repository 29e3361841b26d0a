"""The text half of a base that also sees: its decoder, by itself the base of another architecture.

What such a base gives for a text is what its decoder gives, so the decoder is kept when the base is
pulled, and the adapters that were trained on the whole are kept for their text half.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from registry.base import BaseModel, Bases
from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.convert import LORA_TYPES, parse_lora
from registry.errors import Problem, Refused, refused
from registry.jsonfile import read_object
from registry.lora import AdapterConfig, endings, first_match
from registry.tensors import (
    ADAPTER_BOUNDS,
    INDEX_NAME,
    Tensor,
    header_in,
    read_folder,
    read_header,
    write_file,
)
from registry.upload import ALLOWED
from registry.validate import base_id, read_card

# model_type of the whole → that of its decoder, where config.json does not say it.
SEEING = {"gemma3": "gemma3_text", "mistral3": "mistral"}
TEXT_HALF = "its text half"  # the origin of such a base ends with it
# What a decoder is by itself; others, and wholes whose decoder reads a text otherwise, stay whole.
_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
# Names in checkpoints and in memory; which is which has changed with versions of transformers.
_TEXT = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
_LANGUAGE = ("language_model.model.", "model.language_model.")
_SIGHT = tuple(
    f"{before}{part}."
    for before in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)
_PEFT = "base_model.model."
# Fields that name modules; where LoRA is put has more of them.
_SAVED = ("modules_to_save",)
_TARGETS = ("target_modules", "exclude_modules", "feedforward_modules")


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return config.json of the decoder of a base that sees; None: it is no such base."""
    kind, text = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind not in SEEING or not isinstance(text, dict):
        return None
    own: dict[str, Any] = {"model_type": SEEING[kind], **cast("dict[str, Any]", text)}
    if str(own["model_type"]) not in _CLASSES:
        return None
    # What the decoder does not say itself is said once for both halves.
    both = ("dtype", "torch_dtype", "quantization_config", "bos_token_id")
    own |= {key: config[key] for key in both if own.get(key) is None and key in config}
    if ends := _ids(own.get("eos_token_id")) | _ids(config.get("eos_token_id")):
        own["eos_token_id"] = sorted(ends)
    if kind == "gemma3":
        own["final_logit_softcapping"] = None  # the whole bends no logits, whatever this says
    return own | {"architectures": [_CLASSES[own["model_type"]]]}


def write_text_base(
    whole: Path, folder: Path, config: Mapping[str, Any]
) -> Iterator[tuple[int, int]]:
    """Write the decoder of the base in `whole` into a new folder; yield bytes written, and in all.

    `config`: see `text_config`. Raises Refused for files that are no safetensors, and for tensors
    of neither half.
    """
    folder.mkdir()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_folder(whole).items():
        if text := _text_name(name):
            files.setdefault(tensor.path.name, {})[text] = tensor
        elif not name.startswith(_SIGHT):
            message = f"{name[:120]!r} is neither of the decoder nor of the image encoder."
            raise refused("unknown_key", message)
    names = [name for tensors in files.values() for name in tensors]
    tied = not any(name.startswith("lm_head.") for name in names)
    made = json.dumps({**config, "tie_word_embeddings": tied}, indent=2)
    (folder / "config.json").write_text(made)
    for path in whole.iterdir():
        other = path.suffix != ".safetensors" and path.name not in ("config.json", INDEX_NAME)
        if other and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    if len(files) > 1:
        index = {name: file for file, tensors in files.items() for name in tensors}
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    every = [tensor for tensors in files.values() for tensor in tensors.values()]
    done, total = 0, sum(tensor.stop - tensor.start for tensor in every)
    for file, tensors in files.items():
        path = folder / (file if len(files) > 1 else "model.safetensors")
        for written in write_file(path, tensors):
            done += written
            yield done, total


def keep_text(folder: Path, bases: Bases, *, base: str | None = None) -> Problem | None:
    """Keep the text half of an adapter in `folder` that was trained on a whole; tell what was done.

    None: it is no such adapter, or none at all, and nothing was touched. Raises as `validate` does.
    """
    weights, path = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    if not weights.exists() or not path.exists():
        return None
    try:
        # Of all others the header is not parsed for this.
        if b"language_model." not in header_in(weights, weights.stat().st_size, ADAPTER_BOUNDS):
            return None
        tensors = read_header(weights, ADAPTER_BOUNDS)
        raw = read_object(path, ALLOWED[CONFIG_NAME])
    except Refused:
        return None  # `validate` says what is wrong, with all else that is
    kept, left, before = dict[str, Tensor](), list[str](), set[str]()
    for name, tensor in tensors.items():
        inner = name.removeprefix(_PEFT) if name.startswith(_PEFT) else ""
        if inner.startswith(_SIGHT):
            left.append(name)
            continue
        before |= {each for each in _LANGUAGE if inner.startswith(each)}
        text = _text_name(inner)
        kept[f"{_PEFT}{text}" if text else name] = tensor
    if len(before) != 1 or len(kept) + len(left) < len(tensors):
        return None  # nothing of a decoder, or two of one name: `validate` knows none of them
    raw = _with_text_names(raw, kept, left)
    if config := parse_lora(raw):
        model = bases.get(base_id(config, read_card(folder), base))
        raw |= _written_out(raw, config, model, before.pop(), "\n".join(left))
    path.write_text(json.dumps(raw))
    made = weights.with_name(f".{WEIGHTS_NAME}")
    for _ in write_file(made, kept):
        pass
    made.replace(weights)
    seen = f" {len(left)} tensors of what sees were left out: no text meets them." if left else ""
    return ("converted", f"It was trained on a base that also sees; its text half is kept.{seen}")


def _ids(value: Any) -> set[int]:
    found = cast("list[Any]", value if isinstance(value, list) else [value])
    return {each for each in found if isinstance(each, int)}


def _text_name(name: str) -> str | None:
    """Return what a tensor or module is called in the decoder by itself; None: it is not there."""
    found = next((before for before in _TEXT if name.startswith(before)), None)
    return None if found is None else _TEXT[found] + name.removeprefix(found)


def _with_text_names(
    raw: dict[str, Any], kept: Mapping[str, Tensor], left: Sequence[str]
) -> dict[str, Any]:
    """Return the configuration with the decoder's names where modules are saved or named in full.

    Where LoRA and its kin are put is left to `_written_out`.
    """
    # As one text each: a list may be long, and the tensors are thousands.
    here, gone = "\n".join(kept), "\n".join(left)
    found = dict(raw)
    lists = _SAVED if raw.get("peft_type") in LORA_TYPES else (*_SAVED, *_TARGETS)
    for key in lists:
        names = raw.get(key)
        listed = cast("list[Any]", names) if isinstance(names, list) else []
        if 0 < len(listed) <= ADAPTER_BOUNDS.tensors:
            renamed = [_renamed(name) for name in listed]
            found[key] = [n for n in renamed if f".{n}." not in gone or f".{n}." in here] or None
        elif isinstance(names, str) and raw.get("peft_type") == "TRAINABLE_TOKENS":
            found[key] = _renamed(names)
    tokens = raw.get("trainable_token_indices")
    if isinstance(tokens, dict):
        named = cast("dict[str, Any]", tokens)
        found["trainable_token_indices"] = {
            text.rpartition(".")[2] if (text := _text_name(name)) else name: ids
            for name, ids in named.items()
        }
    return found


def _renamed(name: Any) -> Any:
    return (_text_name(name) or name) if isinstance(name, str) else name


def _written_out(
    raw: Mapping[str, Any], config: AdapterConfig, model: BaseModel, before: str, gone: str
) -> dict[str, Any]:
    """Return the fields that say which modules are trained, and how, with every module in full.

    peft compares them with the end of a module's name in the whole, where it is another one.
    """
    whole = {name: before + name.removeprefix("model.") for name in model.linears}
    found: dict[str, Any] = {}
    if config.targets_regex is None:
        ends = set[str]().union(*map(endings, whole.values()))
        # What is in neither half is left for `validate` to name.
        others = [n for n in config.target_modules if n not in ends and f".{n}." not in gone]
        found["target_modules"] = [n for n in whole if config.targets(whole[n])] + others
        found |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    if raw.get("rank_pattern"):
        ranks = {name: config.rank(where) for name, where in whole.items()}
        found["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != config.r}
    if raw.get("alpha_pattern"):
        usual = config.lora_alpha
        alphas = {n: first_match(config.alpha_pattern, where, usual) for n, where in whole.items()}
        found["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != usual}
    return found
