"""The text half of a base that also sees: its decoder, by itself the base of another architecture.

What such a base gives for a text is what its decoder gives, so the decoder is kept when the base is
pulled, and the adapters that were trained on the whole are kept for their text half.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from registry.contents import CONFIG_NAME, WEIGHTS_NAME
from registry.errors import Problem, Refused
from registry.jsonfile import read_object
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
_NAMED = ("target_modules", "exclude_modules", "modules_to_save")  # lists of modules
_PATTERNS = ("rank_pattern", "alpha_pattern")  # modules are their keys


def text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return config.json of the decoder of a base that sees; None: it is no such base."""
    kind, text = config.get("model_type"), config.get("text_config")
    if kind not in SEEING or not isinstance(text, dict):
        return None
    own: dict[str, Any] = {"model_type": SEEING[kind], **cast("dict[str, Any]", text)}
    if own["model_type"] not in _CLASSES:
        return None
    # What the decoder does not say itself is said once for both halves.
    both = ("dtype", "torch_dtype", "quantization_config", "bos_token_id", "eos_token_id")
    shared = {key: config[key] for key in both if own.get(key) is None and key in config}
    return own | shared | {"architectures": [_CLASSES[own["model_type"]]]}


def write_text_base(
    whole: Path, folder: Path, config: Mapping[str, Any]
) -> Iterator[tuple[int, int]]:
    """Write the decoder of the base in `whole` into a new folder; yield bytes written, and in all.

    `config`: see `text_config`. Raises Refused for files that are no safetensors.
    """
    folder.mkdir()
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_folder(whole).items():
        if text := _text_name(name):
            files.setdefault(tensor.path.name, {})[text] = tensor
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


def keep_text(folder: Path) -> Problem | None:
    """Keep the text half of an adapter in `folder` that was trained on a whole; tell what was done.

    None: it is no such adapter, or none at all, and nothing was touched.
    """
    weights, config = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    if not weights.exists() or not config.exists():
        return None
    try:
        # Of all others the header is not parsed for this.
        if b"language_model." not in header_in(weights, weights.stat().st_size, ADAPTER_BOUNDS):
            return None
        tensors = read_header(weights, ADAPTER_BOUNDS)
        raw = read_object(config, ALLOWED[CONFIG_NAME])
    except Refused:
        return None  # `validate` says what is wrong, with all else that is
    inner = {name: name.removeprefix(_PEFT) for name in tensors if name.startswith(_PEFT)}
    if not any(name.startswith(_LANGUAGE) for name in inner.values()):
        return None
    kept, left = dict[str, Tensor](), list[str]()
    for name, tensor in tensors.items():
        if inner.get(name, "").startswith(_SIGHT):
            left.append(name)
        else:
            text = _text_name(inner.get(name, ""))
            kept[f"{_PEFT}{text}" if text else name] = tensor
    if len(kept) + len(left) < len(tensors):
        return None  # two of one name: `validate` knows neither
    config.write_text(json.dumps(_renamed(raw, kept, left)))
    made = weights.with_name(f".{WEIGHTS_NAME}")
    for _ in write_file(made, kept):
        pass
    made.replace(weights)
    seen = f" {len(left)} tensors of what sees were left out: no text meets them." if left else ""
    return ("converted", f"It was trained on a base that also sees; its text half is kept.{seen}")


def _text_name(name: str) -> str | None:
    """Return what a tensor or module is called in the decoder by itself; None: it is not there."""
    found = next((before for before in _TEXT if name.startswith(before)), None)
    return None if found is None else _TEXT[found] + name.removeprefix(found)


def _renamed(raw: dict[str, Any], kept: Mapping[str, Tensor], left: list[str]) -> dict[str, Any]:
    """Return the configuration with the decoder's names, without those of what was left out."""

    # As one text each: a list may be long, and the tensors are thousands.
    here, gone = "\n".join(kept), "\n".join(left)
    found = dict(raw)
    for key in _NAMED:
        if isinstance(raw.get(key), list) and len(raw[key]) <= ADAPTER_BOUNDS.tensors:
            names = [_text_name(name) or name for name in map(str, raw[key])]
            found[key] = [n for n in names if f".{n}." not in gone or f".{n}." in here]
    for key in _PATTERNS:
        if isinstance(raw.get(key), dict):
            found[key] = {_text_name(name) or name: value for name, value in raw[key].items()}
    return found
