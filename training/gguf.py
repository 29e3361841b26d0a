"""GGUF to plain safetensors, once, so that nothing else ever sees a quantised base.

A model that transformers loads with `gguf_file=` computes correctly but cannot be trained or
saved: it keeps a quantizer that says no to both, `architectures` is empty and its name comes from
the file's metadata. So the weights move into a fresh model of the same class.
"""

import hashlib
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from training.errors import BaseUnavailable
from training.progress import own_progress_only

MAGIC = b"GGUF"


def convert_gguf(gguf: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, tokenizer, generation config and safetensors of `dtype` into `folder`."""
    _check_magic(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    # The reader of GGUF files draws a bar that no switch turns off; it goes to stderr.
    with own_progress_only(), redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = _plain_model(gguf, dtype)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # with the chat template


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain_model(gguf: Path, dtype: torch.dtype) -> Any:
    """Return an unquantised model with the weights of the GGUF file."""
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    architecture = type(source)
    settings = source.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_model_name_or_path", None)  # the metadata's title, not an id
    config = type(source.config).from_dict(settings)
    config.architectures = [architecture.__name__]
    config.dtype = dtype
    model: Any = architecture(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.to(dtype).eval()


def _check_magic(gguf: Path) -> None:
    with gguf.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise BaseUnavailable(
            f"{gguf} is not a GGUF file: it starts with {start!r}, not {MAGIC!r}."
        )
