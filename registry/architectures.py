"""Which architectures can be served: those that the engine was held to PEFT with, by name.

A name is the `model_type` of config.json. Another one may run in transformers, but a layer of it
may read what is not handed on (a bias of the attention, a state, a mask of its own), and then it
would answer something else. It is refused by name.
"""

from pathlib import Path
from typing import Any

from registry.jsonfile import read_object

MAX_CONFIG_BYTES = 1 << 20

# The engine's own forward pass computes these.
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")
# transformers' own forward pass computes these, over the engine's attention and linears.
THROUGH_TRANSFORMERS = (
    *("apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "ernie4_5_moe", "exaone4"),
    *("exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe"),
    *("gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense"),
    *("jais2", "minimax_m2", "ministral", "ministral3", "mixtral", "nanochat", "olmo", "olmo2"),
    *("olmo3", "olmoe", "opt", "phi", "phi3", "qwen2_moe", "qwen3_moe", "seed_oss"),
    *("smollm3", "solar_open", "starcoder2", "vaultgemma"),
)
# These store the weight of a linear as [in, out] (transformers' Conv1D). A and B are as always.
TRANSPOSED = ("gpt2",)
# The embedding where it is no `model.embed_tokens`.
EMBEDDINGS = {
    "gpt2": "transformer.wte",
    "gpt_bigcode": "transformer.wte",
    "gpt_neox": "gpt_neox.embed_in",
    "opt": "model.decoder.embed_tokens",
}


def read_base_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a base as it is. Raises Refused when it is no JSON object."""
    return read_object(folder / "config.json", MAX_CONFIG_BYTES)


def unsupported_architecture(config: dict[str, Any]) -> str | None:
    """Return why a base with this config.json cannot be served; None when it can."""
    kind = config.get("model_type")
    served = sorted((*LLAMA_FAMILY, *THROUGH_TRANSFORMERS))
    if kind in served:
        return None
    return (
        f"model_type={kind!r} is no architecture that wardrobe serves. These are: "
        f"{', '.join(served)}."
    )


def module_of(name: str, kind: str) -> str:
    """Return the module that a tensor `*.weight` belongs to, as PEFT names it."""
    return name_in_peft(name.removesuffix(".weight"), kind)


def name_in_peft(name: str, kind: str) -> str:
    """Return the name of a base's tensor, or of a module, as PEFT has it."""
    # The first checkpoints of GPT-2 were saved without the head around the decoder.
    bare = kind == "gpt2" and not name.startswith(("transformer.", "lm_head"))
    return f"transformer.{name}" if bare else name
