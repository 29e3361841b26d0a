"""Which files a version of each kind consists of: its identity, together with the card's prompt."""

from collections.abc import Collection

from registry.errors import Problem

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MODEL_NAME = "model.safetensors"

ADAPTER = (CONFIG_NAME, WEIGHTS_NAME)
WHOLE = (MODEL_NAME,)  # a full fine-tune as it is; registry/whole.py
NO_FILES = ()  # what the card says goes before the messages is all there is

# kind → the sets of files that a version of it may consist of, the usual one first
CONTENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lora": (ADAPTER,),
    "full": (ADAPTER, WHOLE),
    "prompt": (NO_FILES,),
}

# Files of a base model beside its weights → the most bytes of each. A whole model may bring them
# along; they must be the base's own and are not stored again.
COMPANIONS = {
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "tokenizer.json": 256 << 20,
    "tokenizer.model": 64 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 16 << 20,
    "vocab.json": 64 << 20,
    "merges.txt": 64 << 20,
    "chat_template.jinja": 1 << 20,
}


def identity_files(names: Collection[str]) -> tuple[str, ...]:
    """Return those of the names that belong to a version's identity; a README does not."""
    return tuple(name for name in (*ADAPTER, *WHOLE) if name in names)


def check_contents(kind: str, names: Collection[str]) -> list[Problem]:
    """Return why a version of this kind does not consist of these files."""
    found, usual = identity_files(names), CONTENTS[kind][0]
    if found in CONTENTS[kind]:
        return []
    cure = "Save the adapter with save_pretrained, or give the card the kind 'prompt'."
    missing = [
        ("file_missing", f"{name} is missing for the kind {kind!r}. {cure}")
        for name in usual
        if name not in found
    ]
    cure = "Take it out, or give the card the kind 'lora', which may carry a prompt too."
    unexpected = [
        ("file_unexpected", f"{name} is no part of the kind {kind!r}. {cure}")
        for name in found
        if name not in usual
    ]
    return missing + unexpected
