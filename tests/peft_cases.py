"""What PEFT can save, one adapter of each kind: the rows of the table in docs/peft.md."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from registry.architectures import EMBEDDINGS
from registry.config import REFUSED_TYPES
from tests import tiny

Outcome = Literal["worn", "converted", "refused"]
BASE_ID = "acme/tiny"
FEW = [90, *range(50)]  # tokens
SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One way to use PEFT, what a push of it answers, and how it is worn."""

    title: str
    outcome: Outcome
    how: str  # for the table: how it is computed, or why not
    config: Callable[[], PeftConfig]
    says: str = ""  # part of the refusal
    noise: float = 0.1  # added to everything that is trained
    prepare: Callable[[Any], None] = field(default=lambda _: None)  # the PEFT model, before saving
    vocab: int | None = None  # that the base is resized to before


def lora(**options: Any) -> Callable[[], PeftConfig]:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": SOME}
    # Copied, because PEFT adds to the lists.
    return lambda: LoraConfig(task_type="CAUSAL_LM", **deepcopy(defaults | options))


def other(kind: str, **options: Any) -> Callable[[], PeftConfig]:
    return lambda: getattr(peft, kind)(task_type="CAUSAL_LM", **options)


def low_rank(kind: str, **options: Any) -> Callable[[], PeftConfig]:
    return other(kind, **({"r": 4, "target_modules": SOME} | options))


LORA = [
    Case("LoRA", "worn", "y + scale · B(A(x))", lora()),
    Case("rsLoRA", "worn", "its scale", lora(use_rslora=True)),
    Case(
        "`rank_pattern`, `alpha_pattern`",
        "worn",
        "each module's own rank and scale",
        lora(rank_pattern={"q_proj": 7, "layers.1.mlp.up_proj": 2}, alpha_pattern={"v_proj": 20}),
    ),
    Case('`target_modules="all-linear"`', "worn", "", lora(target_modules="all-linear")),
    Case(
        "`target_modules` as a regular expression",
        "worn",
        "the names of the modules are written out; the expression is never run",
        lora(target_modules=r".*layers\.\d\.self_attn\.(q|o)_proj"),
    ),
    Case(
        "`target_modules` with whole names, `exclude_modules`",
        "worn",
        "",
        lora(
            target_modules=["model.layers.0.self_attn.q_proj", "up_proj", "o_proj"],
            exclude_modules=["layers.1.mlp.up_proj"],
        ),
    ),
    Case(
        "`layers_to_transform`",
        "worn",
        "other layers are the base's",
        lora(layers_to_transform=[1]),
    ),
]

BESIDE = [
    Case(
        '`bias="all"`',
        "worn",
        "the difference to the base's bias is added",
        lora(bias="all"),
    ),
    Case('`bias="lora_only"`', "worn", "the same", lora(bias="lora_only")),
    Case("`lora_bias`", "worn", "scale · the bias of B is added", lora(lora_bias=True)),
    Case(
        "DoRA",
        "worn",
        "outputs are scaled by m / ‖W + BA‖, computed in float32 when it is loaded",
        lora(use_dora=True, target_modules="all-linear"),
    ),
    Case(
        'DoRA with rsLoRA, patterns and `bias="all"`',
        "worn",
        "all of it together",
        lora(use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, bias="all"),
    ),
    Case(
        "`modules_to_save` of norms",
        "worn",
        "each row has its own norms",
        lora(modules_to_save=["input_layernorm", "post_attention_layernorm", "model.norm"]),
    ),
    Case(
        "`modules_to_save` of some norms",
        "worn",
        "",
        lora(modules_to_save=["layers.1.input_layernorm"]),
    ),
    Case(
        "`modules_to_save` of the embedding",
        "worn",
        "each row reads its own; a tied head stays the base's, as in PEFT",
        lora(modules_to_save=["embed_tokens"]),
    ),
    Case(
        "`modules_to_save` of the embedding, some tokens trained",
        "worn",
        "only rows that are not the base's take memory",
        lora(modules_to_save=["embed_tokens"]),
        noise=0.2,
        prepare=lambda wearing: _untrain(wearing, range(128, 258)),
    ),
    Case(
        "`modules_to_save` of the head",
        "worn",
        "one more product for the adapter's rows; a tied embedding stays the base's",
        lora(modules_to_save=["lm_head"]),
    ),
    Case(
        "`modules_to_save` of embedding, head and norms",
        "worn",
        "all of it together",
        lora(modules_to_save=["embed_tokens", "lm_head", "model.norm"]),
    ),
    Case(
        "`modules_to_save` of the embedding, `trainable_token_indices` of the head",
        "worn",
        "each its own",
        lora(modules_to_save=["embed_tokens"], trainable_token_indices={"lm_head": FEW}),
        noise=0.2,
    ),
    Case(
        "`ensure_weight_tying`, the embedding saved",
        "worn",
        "on a tied base PEFT saves it as the head, too; elsewhere the head stays the base's",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    Case(
        "`ensure_weight_tying`, the head and norms saved",
        "worn",
        "on a tied base PEFT saves it as the embedding, too",
        lora(modules_to_save=["model.norm", "lm_head"], ensure_weight_tying=True),
    ),
    Case(
        "`ensure_weight_tying`, `trainable_token_indices`",
        "worn",
        "as without it",
        lora(
            trainable_token_indices={"embed_tokens": FEW, "lm_head": FEW},
            ensure_weight_tying=True,
        ),
        noise=0.2,
    ),
    Case(
        "`trainable_token_indices`",
        "worn",
        "rows of the embedding, and of the head where it is the embedding",
        lora(trainable_token_indices=[200, 3, 65, *range(90, 120)]),
        noise=0.2,
    ),
    Case(
        "`trainable_token_indices` of embedding and head",
        "worn",
        "each its own",
        lora(trainable_token_indices={"embed_tokens": [*range(80)], "lm_head": [5, 7, 250]}),
        noise=0.2,
    ),
    Case(
        "IA3",
        "worn",
        "outputs are scaled; the input of `down_proj` by scaling what `up_proj` gives",
        other(
            "IA3Config",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        ),
        noise=0.3,
    ),
    Case(
        "IA3 of other outputs",
        "worn",
        "outputs are scaled",
        other("IA3Config", target_modules=["q_proj", "o_proj"], feedforward_modules=[]),
        noise=0.3,
    ),
    Case(
        "BEFT", "worn", "a bias is added", other("BeftConfig", target_modules=["v_proj"]), noise=0.3
    ),
    Case(
        "LN tuning",
        "worn",
        "each row has its own norms",
        other("LNTuningConfig", target_modules=["input_layernorm", "model.norm"]),
    ),
    Case(
        "Trainable tokens",
        "worn",
        "as `trainable_token_indices`",
        other("TrainableTokensConfig", token_indices=[9, 8, *range(100, 180)]),
        noise=0.2,
    ),
    Case(
        "Prompt tuning",
        "worn",
        "embeddings before the prompt, which are read as tokens are",
        other("PromptTuningConfig", num_virtual_tokens=5),
        noise=0.5,
    ),
    Case(
        "P-tuning",
        "worn",
        "the same: PEFT saves what its encoder gives",
        other("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
        noise=0.5,
    ),
    Case(
        "Prefix tuning",
        "worn",
        "keys and values of positions before the prompt are copied into the cache",
        other("PrefixTuningConfig", num_virtual_tokens=6),
        noise=0.5,
    ),
    Case(
        "Prefix tuning, `prefix_projection`",
        "worn",
        "the same: PEFT saves what the projection gives",
        other(
            "PrefixTuningConfig",
            num_virtual_tokens=3,
            prefix_projection=True,
            encoder_hidden_size=16,
        ),
        noise=0.5,
    ),
    Case(
        "Cartridges",
        "worn",
        "as prefix tuning",
        other("CartridgeConfig", num_virtual_tokens=4, num_frozen_tokens=1),
        noise=0.5,
    ),
]

CONVERTED = [
    Case("LoHa", "converted", "Khatri-Rao products, rank r²", low_rank("LoHaConfig", r=3, alpha=5)),
    Case(
        "LoKr",
        "converted",
        "Kronecker products, rank of W₁ · rank of W₂",
        low_rank("LoKrConfig", r=2, alpha=3),
    ),
    Case(
        "LoKr, `decompose_both`",
        "converted",
        "rank r²",
        low_rank("LoKrConfig", r=2, alpha=3, decompose_both=True, decompose_factor=4),
    ),
    Case("VeRA", "converted", "diag(b) B, diag(d) A; rank r", low_rank("VeraConfig"), noise=0.3),
    Case(
        "AdaLoRA",
        "converted",
        "E and the scale go into B; the rank that is left",
        other(
            "AdaLoraConfig", init_r=5, target_r=3, total_step=10, target_modules=SOME, lora_alpha=9
        ),
        noise=0.3,
    ),
    Case(
        "DeLoRA", "converted", "lengths and norms go into A and B; rank r", low_rank("DeloraConfig")
    ),
    Case(
        "MiSS", "converted", "sums of inputs are a matrix of ones; rank r", low_rank("MissConfig")
    ),
    Case(
        'MiSS, `init_weights="mini"`',
        "converted",
        "the same, the outputs repeated",
        low_rank("MissConfig", init_weights="mini", mini_r=8),
    ),
    Case(
        "VB-LoRA",
        "converted",
        "A and B are put together from the bank; rank r",
        low_rank("VBLoRAConfig", num_vectors=12, vector_length=16, topk=2),
        noise=0.3,
    ),
    Case(
        "GraLoRA",
        "converted",
        "blocks side by side; rank k · r + hybrid_r",
        low_rank("GraloraConfig", gralora_k=2, hybrid_r=2, alpha=8),
    ),
]

REFUSED = [
    Case(
        "LoHa of r > 16",
        "refused",
        "its rank as a LoRA, r², is over 256",
        low_rank("LoHaConfig", r=17),
        says="rank 289",
    ),
    Case(
        "IA3 of the inputs of other modules",
        "refused",
        "no scale of an output says it",
        other("IA3Config", target_modules=["q_proj"], feedforward_modules=["q_proj"]),
        says="scaled inputs are served for mlp.down_proj only",
    ),
    Case(
        "`modules_to_save` of other matrices",
        "refused",
        "a whole matrix for one adapter; LoRA trains it",
        lora(modules_to_save=["o_proj"]),
        says="other matrices are not",
    ),
    Case(
        "A resized vocabulary",
        "refused",
        "the base has other tokens",
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        says="a resized vocabulary is not servable",
        vocab=260,
    ),
    Case(
        "A resized vocabulary beside LoRA",
        "refused",
        "the same",
        lora(),
        says="the vocabulary was resized",
        vocab=260,
    ),
    Case(
        "LoRA on embeddings or the head",
        "refused",
        "not served yet",
        lora(target_modules=["q_proj", "embed_tokens"]),
        says="embed_tokens",
    ),
    Case(
        "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA as trained",
        "refused",
        "they change the base; saved with `path_initial_model_for_weight_conversion` it is a LoRA",
        lora(init_lora_weights="pissa"),
        says="path_initial_model_for_weight_conversion",
    ),
    Case(
        "aLoRA",
        "refused",
        "the adapter begins in the middle of a prompt",
        lora(alora_invocation_tokens=[1, 2]),
        says="alora_invocation_tokens",
    ),
    Case(
        "`layer_replication`",
        "refused",
        "the base would have other layers",
        lora(layer_replication=[(0, 2), (1, 2)]),
        says="layer_replication",
    ),
]


# Linears and norms of architectures that name them otherwise than Llama does.
NAMES: dict[str, tuple[list[str], list[str]]] = {
    "apertus": (["q_proj", "up_proj"], ["attention_layernorm", "feedforward_layernorm"]),
    "arcee": (["q_proj", "up_proj"], ["input_layernorm", "model.norm"]),
    "ernie4_5_moe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "exaone_moe": (["q_proj", "o_proj"], ["post_feedforward_layernorm", "model.norm"]),
    "flex_olmo": (["q_proj", "o_proj"], ["post_feedforward_layernorm", "model.norm"]),
    "glm4_moe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "granitemoe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "jais2": (["q_proj", "up_proj"], ["input_layernorm", "model.norm"]),
    "minimax_m2": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "nanochat": (["q_proj", "fc1"], []),
    "solar_open": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "vaultgemma": (SOME, ["pre_feedforward_layernorm", "model.norm"]),
    "cohere": (SOME, ["input_layernorm", "model.norm"]),
    "cohere2": (SOME, ["input_layernorm", "model.norm"]),
    "exaone4": (SOME, ["post_feedforward_layernorm", "model.norm"]),
    "glm": (["q_proj", "gate_up_proj"], ["post_attention_layernorm", "model.norm"]),
    "glm4": (["q_proj", "gate_up_proj"], ["post_self_attn_layernorm", "model.norm"]),
    "gpt2": (["c_attn", "c_proj", "c_fc"], ["ln_1", "ln_f"]),
    "gpt_bigcode": (["c_attn", "c_fc"], ["ln_2", "ln_f"]),
    "gpt_neox": (["query_key_value", "dense_h_to_4h"], ["input_layernorm", "final_layer_norm"]),
    "mixtral": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "olmo": (SOME, []),
    "olmo2": (SOME, ["post_feedforward_layernorm", "model.norm"]),
    "olmo3": (SOME, ["post_attention_layernorm", "model.norm"]),
    "olmoe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "opt": (["q_proj", "v_proj", "out_proj", "fc1"], ["self_attn_layer_norm", "final_layer_norm"]),
    "phi": (["q_proj", "dense", "fc1"], ["input_layernorm", "final_layernorm"]),
    "phi3": (["qkv_proj", "gate_up_proj", "down_proj"], ["input_layernorm", "model.norm"]),
    "qwen2_moe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "qwen3_moe": (["q_proj", "o_proj"], ["input_layernorm", "model.norm"]),
    "starcoder2": (["q_proj", "c_proj", "c_fc"], ["post_attention_layernorm", "model.norm"]),
}
LIKE_LLAMA = (SOME, ["input_layernorm", "post_attention_layernorm", "model.norm"])


def cases_of(arch: str) -> list[Case]:
    """Return one of each thing that can be worn on an architecture that transformers computes."""
    linears, norms = NAMES.get(arch, LIKE_LLAMA)
    options: dict[str, Any] = {"target_modules": linears, "fan_in_fan_out": arch == "gpt2"}
    tuned: dict[str, Callable[[], PeftConfig]] = {
        "Prompt tuning": other("PromptTuningConfig", num_virtual_tokens=5),
        "P-tuning": other("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=16),
    }
    if arch not in ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "phi3"):  # opt: see `tiny.make_base`
        tuned["Prefix tuning"] = other("PrefixTuningConfig", num_virtual_tokens=6)
    if arch != "gpt2":  # PEFT says fan_in_fan_out there, which is refused for IA3
        tuned["IA3"] = other("IA3Config", target_modules=linears[:2], feedforward_modules=[])
    found: dict[str, Callable[[], PeftConfig]] = {
        "LoRA": lora(**options),
        "DoRA": lora(use_dora=True, **options),
        "`lora_bias`": lora(lora_bias=True, **options),
    }
    if norms:
        found["`modules_to_save` of norms"] = lora(modules_to_save=norms, **options)
        found["LN tuning"] = other("LNTuningConfig", target_modules=norms)
    if arch != "phi":  # its head has one, too, which is refused
        found['`bias="all"`'] = lora(bias="all", **options)
    if arch not in ("phi", *EMBEDDINGS):
        saved, some = ["embed_tokens", "lm_head"], [3, 200, *range(40, 130)]
        found["`modules_to_save` of embedding and head"] = lora(modules_to_save=saved, **options)
        tuned["`trainable_token_indices`"] = lora(trainable_token_indices=some, **options)
    return [
        Case(title, "worn", "", config, noise=noise)
        for cases, noise in ((found, 0.1), (tuned, 0.3))
        for title, config in cases.items()
    ]


def _untrain(wearing: Any, tokens: range) -> None:
    """Put the base's rows of some tokens back into an embedding that was trained in full."""
    embedding = wearing.get_base_model().model.embed_tokens
    with torch.no_grad():
        embedding.weight[tokens] = embedding.original_module.weight[tokens]


CASES = [*LORA, *BESIDE, *CONVERTED, *REFUSED]
START, END = "<!-- table: make docs -->\n", "<!-- end of table -->\n"
WORDS = {"worn": "worn", "converted": "worn, stored as LoRA", "refused": "refused"}


def table() -> str:
    """Return the table of docs/peft.md."""
    lines = ["| What PEFT saves | Answer | How, or why not |", "|---|---|---|"]
    lines += [f"| {case.title} | {WORDS[case.outcome]} | {case.how} |" for case in CASES]
    reasons: dict[str, list[str]] = {}
    for kind, reason in REFUSED_TYPES.items():
        reasons.setdefault(reason, []).append(f"`{kind}`")
    lines += [f"| {', '.join(kinds)} | refused | {reason} |" for reason, kinds in reasons.items()]
    return "\n".join(lines)


def make(case: Case, base: Path, folder: Path) -> Path:
    """Save an adapter of the case as PEFT does, with every trained number changed at random."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if case.vocab is not None:
        model.resize_token_embeddings(case.vocab)
    with tiny.peft_on_new_transformers():
        torch.manual_seed(0)  # PEFT draws some of its matrices
        wearing = get_peft_model(model, case.config())
    generator = torch.Generator().manual_seed(len(case.title))
    with torch.no_grad():
        for parameter in wearing.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * case.noise
    case.prepare(wearing)
    wearing.save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs/peft.md"
    before, _, rest = page.read_text().partition(START)
    page.write_text(f"{before}{START}{table()}\n{END}{rest.partition(END)[2]}")
