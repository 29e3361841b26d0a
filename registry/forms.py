"""PEFT types whose change of a weight is exactly a LoRA: how their tensors become A and B.

Nothing is approximated: `B · A` is the change that peft computes, up to the rounding of float32.
The formulas are those of `get_delta_weight` in peft 0.21's `tuners/<type>/layer.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from registry.config import Check, inert, one_of, positive, whole

Array = np.ndarray[Any, np.dtype[np.float32]]
Arrays = Mapping[str, Array]
Dims = Mapping[str, int]
Factors = tuple[Array, Array]  # A [rank, in], B [out, rank]
Options = Mapping[str, Any]  # fields of the adapter_config.json


@dataclass(frozen=True, slots=True)
class Form:
    """One PEFT type.

    `pieces` are the tensors of a module and their shapes in letters: equal letters are equal sizes,
    `out` and `in` are the module's own. A module has one of the sets in `variants`, or all pieces.
    """

    title: str
    pieces: Mapping[str, str]
    rank: Callable[[Dims], int | str]  # of the LoRA; or what is wrong with the sizes
    factors: Callable[[Arrays, Options], Factors]
    alpha: str | None = None  # the field that scales by alpha / r
    variants: tuple[frozenset[str], ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict[str, str])  # of the whole adapter
    fields: Mapping[str, Check] = field(default_factory=dict[str, Check])  # beyond LoRA's own


def _loha(t: Arrays, _: Options) -> Factors:
    """(W1a W1b) ∘ (W2a W2b): the Khatri-Rao products of their factors (arXiv 2108.06098)."""
    b = t["hada_w1_a"][:, :, None] * t["hada_w2_a"][:, None, :]
    a = t["hada_w1_b"][:, None, :] * t["hada_w2_b"][None, :, :]
    return a.reshape(-1, a.shape[2]), b.reshape(b.shape[0], -1)


def _lokr(t: Arrays, _: Options) -> Factors:
    """W1 ⊗ W2 = (B1 ⊗ B2)(A1 ⊗ A2) for any factors of the two (arXiv 2309.14859)."""
    (a1, b1), (a2, b2) = (_either(t, f"lokr_w{i}") for i in (1, 2))
    return np.kron(a1, a2), np.kron(b1, b2)


def _either(t: Arrays, name: str) -> Factors:
    """Return the factors of a matrix that may be saved whole."""
    if name not in t:
        return t[f"{name}_b"], t[f"{name}_a"]
    whole = t[name]
    rows, columns = whole.shape
    one = np.eye(min(rows, columns), dtype=np.float32)
    return (one, whole) if columns <= rows else (whole, one)


def _lokr_rank(d: Dims) -> int | str:
    if d["o1"] * d["o2"] != d["out"] or d["i1"] * d["i2"] != d["in"]:
        return f"the Kronecker product is {[d['o1'] * d['o2'], d['i1'] * d['i2']]}"
    inner = [d.get(f"r{i}") or min(d[f"o{i}"], d[f"i{i}"]) for i in (1, 2)]
    return inner[0] * inner[1]


def _vera(t: Arrays, options: Options) -> Factors:
    """diag(b) B diag(d) A with A and B of all modules cut to this one (arXiv 2310.11454)."""
    d, b = t["vera_lambda_d"], t["vera_lambda_b"]
    return t["vera_A"][:, : options["in"]] * d[:, None], t["vera_B"][: len(b)] * b[:, None]


def _adalora(t: Arrays, options: Options) -> Factors:
    """B diag(E) A · alpha / (rank + 1e-5), as peft divides (arXiv 2303.10512)."""
    alpha = options["lora_alpha"] if options["lora_alpha"] > 0 else len(t["lora_E"])
    scale = np.float32(alpha / (len(t["lora_E"]) + 1e-5))
    return t["lora_A"] * t["lora_E"], t["lora_B"] * scale


def _delora(t: Arrays, _: Options) -> Factors:
    """B diag(lambda / (rank · |A_i| |B_i|)) A · norms of W's columns (arXiv 2503.18225)."""
    a, b = t["delora_A"], t["delora_B"]
    lengths = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(
        np.linalg.norm(b, axis=0), 1e-4
    )
    return a * t["delora_w_norm"], b * (t["delora_lambda"] / len(a) / lengths).astype(np.float32)


def _miss(t: Arrays, options: Options) -> Factors:
    """Sum the inputs by their place modulo r, then one matrix (MiSS, arXiv 2409.15371)."""
    block, inputs, outputs = t["miss_block"], int(options["in"]), int(options["out"])
    a = np.equal.outer(np.arange(len(block)), np.arange(inputs) % len(block)).astype(np.float32)
    return a, np.tile(block, (1, outputs // block.shape[1])).T.copy()


def _vblora(t: Arrays, options: Options) -> Factors:
    """A and B are put together of vectors of one bank, by their largest logits (2405.15179)."""

    def mixed(logits: Array) -> Array:
        best = np.argsort(-logits, axis=-1, kind="stable")[..., : options["topk"]]
        chosen = np.take_along_axis(logits, best, -1)
        weights = np.exp(chosen - chosen.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return (weights[..., None] * t["vblora_vector_bank"][best]).sum(-2)

    a, b = mixed(t["vblora_logits_A"]), mixed(t["vblora_logits_B"]).transpose(0, 2, 1)
    return a.reshape(len(a), -1), b.reshape(-1, b.shape[2])


def _gralora(t: Arrays, options: Options) -> Factors:
    """k · k blocks of rank r / k, and perhaps a plain LoRA beside them (arXiv 2505.20355)."""
    a, b = t["gralora_A"], t["gralora_B"]  # [k, in / k, r], [k, r, out / k]
    k, inputs, rank = a.shape
    outputs, part = b.shape[2], rank // k
    wide_a = np.zeros((k, k, part, k * inputs), np.float32)  # from block, to block, of r / k
    wide_b = np.zeros((k, outputs, k, k, part), np.float32)  # to block, out, from, to, of r / k
    for i in range(k):
        wide_a[i, :, :, i * inputs : (i + 1) * inputs] = a[i].T.reshape(k, part, inputs)
        wide_b[i, :, :, i] = b[i].reshape(k, part, outputs).transpose(2, 0, 1)
    whole_a = wide_a.reshape(-1, k * inputs)
    whole_b = wide_b.reshape(k * outputs, -1)
    if "gralora_A_general.weight" in t:
        whole_a = np.concatenate([whole_a, t["gralora_A_general.weight"]])
        whole_b = np.concatenate([whole_b, t["gralora_B_general.weight"]], 1)
    scale = np.float32(options["alpha"] / (rank + options["hybrid_r"]))
    return whole_a, whole_b * scale


def _gralora_rank(d: Dims) -> int | str:
    if d["k"] * d["kin"] != d["in"] or d["k"] * d["kout"] != d["out"] or d["r"] % d["k"]:
        return f"the {d['k']} blocks have {d['r']} ranks and {[d['kout'], d['kin']]}"
    return d["k"] * d["r"] + d.get("h", 0)


def _tiled(d: Dims) -> int | str:
    return f"{d['rows']} rows do not repeat" if d["out"] % d["rows"] else d["r"]


def _cut(d: Dims) -> int | str:
    small = d["most_in"] < d["in"] or d["most_out"] < d["out"]
    return f"vera_A and vera_B are {[d['most_out'], d['most_in']]}" if small else d["r"]


def _banked(d: Dims) -> int | str:
    whole = d["tin"] * d["v"] == d["in"] and d["tout"] * d["v"] == d["out"]
    return d["r"] if whole else f"the vectors make {[d['tout'] * d['v'], d['tin'] * d['v']]}"


_INIT = {"init_weights": inert}
_DROPOUTS = {"module_dropout": inert, "rank_dropout": inert}

FORMS: dict[str, Form] = {
    "LOHA": Form(
        "LoHa",
        {"hada_w1_a": "out r", "hada_w1_b": "r in", "hada_w2_a": "out r", "hada_w2_b": "r in"},
        lambda d: d["r"] ** 2,
        _loha,
        alpha="alpha",
        fields=_INIT | _DROPOUTS | {"use_effective_conv2d": inert},
    ),
    "LOKR": Form(
        "LoKr",
        {
            "lokr_w1": "o1 i1", "lokr_w1_a": "o1 r1", "lokr_w1_b": "r1 i1",
            "lokr_w2": "o2 i2", "lokr_w2_a": "o2 r2", "lokr_w2_b": "r2 i2",
        },
        _lokr_rank,
        _lokr,
        alpha="alpha",
        variants=tuple(
            frozenset(one | two)
            for one in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
            for two in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
        ),
        fields=_INIT
        | _DROPOUTS
        | dict.fromkeys(
            ("use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"),
            inert,
        ),
    ),
    "VERA": Form(
        "VeRA",
        {"vera_lambda_b": "out", "vera_lambda_d": "r"},
        _cut,
        _vera,
        shared={"vera_A": "r most_in", "vera_B": "most_out r"},
        fields=_INIT
        | dict.fromkeys(("vera_dropout", "d_initial", "projection_prng_key"), inert)
        | {"save_projection": one_of(True)},
    ),
    "ADALORA": Form(
        "AdaLoRA",
        {"lora_A": "r in", "lora_B": "out r", "lora_E": "r 1"},
        lambda d: d["r"],
        _adalora,
        fields=dict.fromkeys(
            (
                *("beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal"),
                *("tinit", "total_step", "rank_pattern", "init_lora_weights"),
            ),
            inert,
        ),
    ),
    "DELORA": Form(
        "DeLoRA",
        {
            "delora_A": "r in", "delora_B": "out r", "delora_lambda": "1", "delora_w_norm": "in",
        },
        lambda d: d["r"],
        _delora,
        fields=_INIT
        | _DROPOUTS
        | dict.fromkeys(("delora_lambda", "lambda_pattern", "rank_pattern"), inert),
    ),
    "MISS": Form(
        "MiSS",
        {"miss_block": "r rows"},
        _tiled,
        _miss,
        fields={"mini_r": inert, "miss_dropout": inert}
        | {"init_weights": one_of(True, False, "mini")},
    ),
    "VBLORA": Form(
        "VB-LoRA",
        {"vblora_logits_A": "r tin n", "vblora_logits_B": "tout r n"},
        _banked,
        _vblora,
        shared={"vblora_vector_bank": "n v"},
        fields=dict.fromkeys(
            (
                *("init_logits_std", "init_vector_bank_bound", "num_vectors", "vblora_dropout"),
                "vector_length",
            ),
            inert,
        )
        | {"save_only_topk_weights": one_of(False), "topk": whole(1, 1 << 20)},
    ),
    "GRALORA": Form(
        "GraLoRA",
        {
            "gralora_A": "k kin r", "gralora_B": "k r kout",
            "gralora_A_general.weight": "h in", "gralora_B_general.weight": "out h",
        },
        _gralora_rank,
        _gralora,
        variants=(
            frozenset(("gralora_A", "gralora_B")),
            frozenset(
                f"gralora_{half}{end}" for half in "AB" for end in ("", "_general.weight")
            ),
        ),
        fields=_INIT
        | dict.fromkeys(("gralora_dropout", "gralora_k"), inert)
        | {"alpha": positive, "hybrid_r": whole(0, 1 << 20)},
    ),
}  # fmt: skip
