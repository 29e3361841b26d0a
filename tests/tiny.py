"""Tiny base models and adapters, made on the spot: real files, no network, seconds at most.

A *signature* base emits `SIGNATURE_BASE_TOKEN` whatever the prompt is, and a signature adapter
makes it emit that adapter's own token instead: one row that wears the wrong adapter, or a slot
with somebody else's leftovers in it, shows in one step.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from registry.base import BaseModel, Bases

EOS = "<|im_end|>"
EOS_ID = 257
VOCAB = 258  # 256 bytes, <|im_start|>, <|im_end|>
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ATTENTION + MLP
SIGNATURE_BASE_TOKEN = 46  # a full stop

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How config classes name the width of the MLP, when not `intermediate_size`.
_MLP_WIDTH = {"gpt2": "n_inner", "opt": "ffn_dim"}


def make_base(
    folder: Path,
    *,
    seed: int = 0,
    vocab: int = VOCAB,
    layers: int = 2,
    hidden: int = 64,
    arch: str = "llama",
    **config: Any,
) -> Path:
    """Write a random base in fp32 with a tokenizer of bytes. `config` overrides config fields."""
    model = _random_model(seed, vocab, layers, hidden, arch, config)
    return _save(model, folder)


def make_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = LINEARS,
    seed: int = 0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    strength: float = 0.3,
) -> Path:
    """Write a random LoRA adapter through PEFT; B is not zero. `strength` scales B."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,  # type: ignore[arg-type]  # PEFT takes floats
        target_modules=list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft = _peft(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                scale = weight.shape[1] ** -0.5 * (strength if "lora_B" in name else 1.0)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return _save_adapter(peft.to(dtype), folder)


def make_signature_base(folder: Path, *, layers: int = 2, hidden: int = 64) -> Path:
    """Write a base whose greedy answer is `SIGNATURE_BASE_TOKEN` to every prompt.

    Dimension 0 of every embedding is 1 and no layer writes to it: a feature that is positive at
    every position. Only the base token's row of the head reads it.
    """
    model = _random_model(7, VOCAB, layers, hidden, "llama", {"tie_word_embeddings": False})
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, weight in weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.02)
                weight[0].zero_()
        embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        embedding.mul_(0.02)
        embedding[:, 0] = 1.0
        head[:, 0] = 0.0
        head.div_(head.norm(dim=1, keepdim=True))
        head[SIGNATURE_BASE_TOKEN] = 0.0
        head[SIGNATURE_BASE_TOKEN, 0] = 1.0
    return _save(model, folder)


def make_signature_adapter(folder: Path, base: Path, token_id: int) -> Path:
    """Write an adapter that makes a signature base emit `token_id` after every prompt.

    Even tokens go through the MLP, odd ones through value and output projection. Rank, layer,
    strength and targets differ by token, so that what an earlier adapter left in a slot outweighs
    the adapter that is in it now.
    """
    ranks = (4, 8, 16, 32, 64, 128, 256)
    rank = ranks[(token_id + token_id // len(ranks)) % len(ranks)]  # each with many strengths
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list((*MLP, "q_proj") if token_id % 2 == 0 else ATTENTION),
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft = _peft(base, config)
    strength = 2.0 ** (token_id % 7)  # the strongest still fits into float16
    with torch.no_grad():
        weights = {n: p for n, p in peft.named_parameters() if "lora_" in n}
        for weight in weights.values():
            weight.zero_()
        head = dict(peft.named_parameters())["base_model.model.lm_head.weight"]
        layer = (token_id // 2) % peft.config.num_hidden_layers  # type: ignore[attr-defined]
        if token_id % 2 == 0:
            _sign_mlp(weights, layer, head[token_id], strength)
        else:
            _sign_attention(weights, layer, head[token_id], strength)
    return _save_adapter(peft, folder)


@contextmanager
def peft_on_new_transformers() -> Iterator[None]:
    """PEFT 0.21 reads a property that transformers 5.23 renamed, and is warned for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def register(folder: Path, bases: Bases, id: str) -> BaseModel:  # noqa: A002  # the field's name
    """Register a copy of a base made here: what `wardrobe base pull FOLDER` does."""
    prepared = folder.with_name(f"{folder.name}.prepared")
    shutil.copytree(folder, prepared)
    return bases.add(id, prepared, origin="made on the spot")


def _sign_mlp(
    weights: Mapping[str, torch.Tensor], layer: int, row: torch.Tensor, strength: float
) -> None:
    """Make as many features positive as the rank is, or all of them, and let down write the row."""
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        a, b = _pair(weights, layer, name)
        a[:, 0] = 0.25
        b.copy_(torch.eye(*b.shape))
    a, b = _pair(weights, layer, "mlp.down_proj")
    a.copy_(torch.eye(*a.shape))
    b.copy_(row[:, None] * strength * 2 / min(a.shape))


def _sign_attention(
    weights: Mapping[str, torch.Tensor], layer: int, row: torch.Tensor, strength: float
) -> None:
    """Make every value positive: whatever attention averages, the output writes the head's row."""
    a, b = _pair(weights, layer, "self_attn.v_proj")
    a[:, 0] = 1.0 / a.shape[0]
    b.fill_(1.0)
    a, b = _pair(weights, layer, "self_attn.o_proj")
    a.fill_(1.0 / a.shape[1])
    b.copy_(row[:, None] * strength / a.shape[0])


def _pair(
    weights: Mapping[str, torch.Tensor], layer: int, module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = f"base_model.model.model.layers.{layer}.{module}"
    return weights[f"{prefix}.lora_A.default.weight"], weights[f"{prefix}.lora_B.default.weight"]


def _random_model(
    seed: int, vocab: int, layers: int, hidden: int, arch: str, config: Mapping[str, Any]
) -> PreTrainedModel:
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        _MLP_WIDTH.get(arch, "intermediate_size"): 2 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
        "dtype": torch.float32,
    } | dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.1 * noise)
            else:
                weight.copy_(noise * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5))
    return model


def _save(model: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte value; then the two special tokens."""
    vocab = {char: byte for byte, char in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]  # the stub lacks the setter's type
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]  # as above
    tokenizer.add_special_tokens(["<|im_start|>", EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, chat_template=CHATML
    )


def _byte_letters() -> list[str]:
    """Give the letter that ByteLevel writes for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _peft(base: Path, config: LoraConfig) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config.fan_in_fan_out = model.config.model_type == "gpt2"
    with peft_on_new_transformers():
        return get_peft_model(model, config)  # type: ignore[return-value]  # never PeftMixedModel


def _save_adapter(peft: PeftModel, folder: Path) -> Path:
    """Save only what PEFT itself writes, under a base name that is no path of this machine."""
    peft.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}, indent=2))
    return folder
