"""A full fine-tune: a model folder of its own, with the base's files beside its fp32 weights."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from registry.base import BaseModel
from registry.contents import MODEL_NAME
from registry.tensors import read_folder
from registry.whole import companions
from training.errors import RunFailed


def check_names(model: Any, base: Path) -> None:
    """Refuse a model whose tensors have other names in memory than in the base's file."""
    missing = sorted(set(read_folder(base)) - set(model.state_dict()))
    if missing:
        raise RunFailed(
            f"method.kind = 'full' cannot write this base: transformers has no {missing[0]!r} in "
            "memory, as its file has. Use method.kind = 'lora'."
        )


def as_model(base: BaseModel, folder: Path) -> BaseModel:
    """Return the fine-tuned model in `folder` as a model of its own, with other weights."""
    with (folder / MODEL_NAME).open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(base, path=folder, fingerprint=fingerprint)


def write_whole(model: Any, base: BaseModel, folder: Path) -> None:
    """Write the trained weights in fp32 under the base's names, and the base's other files."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights = {
        name: state[name].detach().to("cpu", torch.float32).contiguous()
        for name in sorted(read_folder(base.path))
    }
    save_file(weights, folder / MODEL_NAME, metadata={"format": "pt"})
    for path in companions(base):
        shutil.copyfile(path, folder / path.name)
