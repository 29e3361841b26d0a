"""The base model with fresh low-rank adapters, in the number format that is fastest here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from training.errors import RecipeError
from training.progress import own_progress_only
from training.recipe import Method


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a run happens. Equal bytes are promised for equal hardware only."""

    device: str  # cpu or cuda
    dtype: str  # of the base's weights: bfloat16 or float32; the adapter is float32
    threads: int

    @property
    def bf16(self) -> bool:
        return self.dtype == "bfloat16"


def detect_hardware() -> Hardware:
    """Take bf16 where the processor multiplies it; elsewhere it is slower than fp32."""
    if torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        return Hardware("cuda", dtype, torch.get_num_threads())
    features = torch.cpu.get_capabilities()
    fast = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return Hardware("cpu", "bfloat16" if fast else "float32", torch.get_num_threads())


def load_lora_model(base: Path, method: Method, hardware: Hardware, seed: int) -> Any:
    """Return a PEFT model: frozen base, adapters seeded, B zero."""
    if method.kind not in ("lora", "rslora"):
        raise RecipeError(f"method.kind = {method.kind!r} cannot be trained here yet.")
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=method.targets if isinstance(method.targets, str) else list(method.targets),
        use_rslora=method.kind == "rslora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    with own_progress_only(), _peft_reads_a_renamed_property():
        model = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=getattr(torch, hardware.dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextmanager
def _peft_reads_a_renamed_property() -> Iterator[None]:
    """PEFT 0.21 asks for a property that transformers 5.23 renamed; nobody here can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
