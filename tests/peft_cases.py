"""What PEFT can save, one adapter of each kind: the rows of the table in docs/peft.md."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from registry.config import REFUSED_TYPES
from tests import tiny

Outcome = Literal["worn", "converted", "refused"]
BASE_ID = "acme/tiny"
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
    base: Literal["tied", "untied"] = "tied"


def lora(**options: Any) -> Callable[[], PeftConfig]:
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": SOME}
    return lambda: LoraConfig(task_type="CAUSAL_LM", **(defaults | options))


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
]

CASES = [*LORA, *CONVERTED, *REFUSED]
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
