"""What is trained: the base model, whole or with fresh adapter weights around its frozen ones."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from training.errors import RunFailed
from training.progress import own_progress_only
from training.recipe import Method, MethodKind
from training.whole import check_names

Batch = dict[str, torch.Tensor]

# Their update is the difference of two large numbers, which bf16 would round away: a residual of
# the base's weights (PiSSA, OLoRA), or a row's length before and after (DoRA).
FP32_KINDS: tuple[MethodKind, ...] = ("pissa", "olora", "dora")


@dataclass(frozen=True, slots=True)
class Hardware:
    """Where a run happens. Equal bytes are promised for equal hardware only."""

    device: str  # cpu or cuda
    dtype: str  # in which a frozen base is fastest: bfloat16 or float32; what is trained is float32
    threads: int

    def weights_dtype(self, kind: MethodKind) -> str:
        """Return the number format of the base's weights while `kind` is trained."""
        return "float32" if kind in (*FP32_KINDS, "full") else self.dtype

    def autocast(self, kind: MethodKind) -> bool:
        """Tell whether the matrix products of `kind` may be done in bf16."""
        return self.dtype == "bfloat16" and kind not in FP32_KINDS


def detect_hardware() -> Hardware:
    """Take bf16 where the processor multiplies it; elsewhere it is slower than fp32."""
    if torch.cuda.is_available():
        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        return Hardware("cuda", dtype, torch.get_num_threads())
    features = torch.cpu.get_capabilities()
    fast = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return Hardware("cpu", "bfloat16" if fast else "float32", torch.get_num_threads())


def check_runnable(method: Method, hardware: Hardware) -> None:
    """Raise RunFailed where the method needs what this machine does not have."""
    if method.kind != "qlora":
        return
    missing = [] if hardware.device == "cuda" else ["a CUDA device"]
    missing += [] if find_spec("bitsandbytes") else ["the package bitsandbytes"]
    if missing:
        raise RunFailed(
            f"method.kind = 'qlora' needs {' and '.join(missing)}, which this machine does not "
            "have. Use method.kind = 'lora': the same adapter over a base that is not quantised."
        )


def load_model(
    base: Path, method: Method, hardware: Hardware, seed: int, batches: Sequence[Batch]
) -> Any:
    """Return the model to train: a PEFT model over the base, or the base itself for `full`.

    The same arguments give the same weights; `batches` are what EVA looks at. Raises RunFailed.
    """
    check_runnable(method, hardware)
    with own_progress_only(), peft_without_advice():
        model = load_base(base, hardware.weights_dtype(method.kind), _quantised(method, hardware))
        if method.kind == "full":
            check_names(model, base)
            return model
        if method.kind == "qlora":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, peft_config(method))
        if method.kind == "eva":
            _initialise_eva(adapted, method, batches)
        return adapted


def load_base(folder: Path, dtype: str, quantised: Any = None) -> Any:
    """Load a model folder from its safetensors; nothing is fetched and none of its code is run."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        quantization_config=quantised,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )


def peft_config(method: Method) -> PeftConfig:
    """Translate a method into PEFT's words."""
    targets = method.targets if isinstance(method.targets, str) else list(method.targets)
    match method.kind:
        case "loha" | "lokr":
            config = LoHaConfig if method.kind == "loha" else LoKrConfig
            return config(
                r=method.r, alpha=method.alpha, target_modules=targets, task_type="CAUSAL_LM"
            )
        case "ia3":
            return IA3Config(task_type="CAUSAL_LM")  # PEFT knows the modules of each architecture
        case "prompt-tuning":
            # Drawn from the vocabulary: PEFT's default noise is far from any embedding.
            return PromptTuningConfig(
                num_virtual_tokens=method.tokens,
                prompt_tuning_init="SAMPLE_VOCAB",
                task_type="CAUSAL_LM",
            )
        case "prefix-tuning":
            return PrefixTuningConfig(num_virtual_tokens=method.tokens, task_type="CAUSAL_LM")
        case "full" | "fewshot" | "base":
            raise RunFailed(f"method.kind = {method.kind!r} trains no adapter.")
        case _:
            init = method.kind if method.kind in ("pissa", "olora", "eva") else True
            return LoraConfig(
                r=method.r,
                lora_alpha=method.alpha,
                lora_dropout=method.dropout,
                target_modules=targets,
                use_rslora=method.kind == "rslora",
                use_dora=method.kind == "dora",
                init_lora_weights=init,  # type: ignore[arg-type]  # PEFT's Literal, one by one
                eva_config=EvaConfig(use_label_mask=False) if method.kind == "eva" else None,
                bias="none",
                task_type="CAUSAL_LM",
            )


def _initialise_eva(model: Any, method: Method, batches: Sequence[Batch]) -> None:
    """Set A to the main directions of what each layer sees (arXiv 2410.07170), ranks included."""
    needed = round(method.r * model.peft_config["default"].eva_config.rho)
    fewest = min(int(batch["attention_mask"].sum()) for batch in batches)
    if fewest < needed:  # PEFT would wait for a larger batch for ever
        raise RunFailed(
            f"EVA finds {needed} directions for method.r = {method.r} and needs as many tokens in "
            f"a batch; one has {fewest}. Lower method.r or give more examples."
        )
    initialize_lora_eva_weights(model, list(batches), show_progress_bar=False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # PEFT made them anew in the base's format


def _quantised(method: Method, hardware: Hardware) -> BitsAndBytesConfig | None:
    """Return the four-bit format of QLoRA (arXiv 2305.14314)."""
    if method.kind != "qlora":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, hardware.dtype),
    )


@contextmanager
def peft_without_advice() -> Iterator[None]:
    """Leave out warnings of PEFT 0.21 that nobody here can act on."""
    with warnings.catch_warnings():
        # It asks for a property that transformers 5.23 renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Position ids are not supported")
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem")
        yield
