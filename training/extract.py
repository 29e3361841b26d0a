"""Make a LoRA of a full fine-tune: what changed in each linear layer, at low rank.

The difference of the fine-tuned and the base's weights is taken in fp32, module by module, and
factorised by SVD. What changed elsewhere (embeddings, norms, the head) cannot be worn and is left
out; its share of the whole change is told.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from registry.adapter import AdapterName, Selector
from registry.architectures import TRANSPOSED, module_of, read_base_config
from registry.base import BaseModel
from registry.config import MAX_RANK
from registry.contents import MODEL_NAME
from registry.store import Registry
from registry.tensors import Tensor, read_folder
from training.adapter_files import PlainLora, write_lora
from training.card import CARD_FILE, NOT_EVALUATED, read_card, write_card
from training.errors import RunFailed
from training.lowrank import LowRank, factorise
from training.progress import Progress, Report
from training.run import open_run
from training.train import TrainedAdapter
from training.whole import as_model

DEFAULT_RANK = 64


@dataclass(frozen=True, slots=True)
class Extraction:
    """What is taken of each module: the smallest rank that keeps `energy`, `rank` at most."""

    rank: int
    energy: float = 1.0

    @classmethod
    def of(cls, rank: int | None, energy: float | None) -> "Extraction":
        """Fill in what is not given: without any, rank 64; an energy alone may need any rank."""
        if rank is None:
            rank = DEFAULT_RANK if energy is None else MAX_RANK
        return cls(rank, energy or 1.0)


@dataclass(frozen=True, slots=True)
class FineTune:
    """A full fine-tune that an adapter is to be made of."""

    folder: Path  # model.safetensors, wardrobe.json
    name: AdapterName  # of the adapter, when it is pushed
    base_id: str
    version: Mapping[str, str]  # for the card: label and digest; empty for a run

    @classmethod
    def find(cls, source: str, registry: Registry, staging: Path) -> "FineTune":
        """Find it in a run folder, else as a version, which is written to `staging`.

        Raises RunFailed where it is none, and what the registry raises.
        """
        for folder in (Path(source), Path(source) / "adapter"):
            if (folder / MODEL_NAME).is_file():
                return cls.in_folder(folder)
        version = registry.resolve(Selector.parse(source))
        if not version.is_whole:
            raise RunFailed(f"{version.ref.label} is no whole model: it is an adapter already.")
        registry.pull(Selector(version.name, number=version.number), staging / "model")
        facts = {"version": version.ref.label, "digest": version.digest}
        return cls(staging / "model", version.name, version.base_id, facts)

    @classmethod
    def in_folder(cls, folder: Path) -> "FineTune":
        try:
            card = read_card(folder)
            return cls(folder, AdapterName.parse(card["recipe"]["name"]), card["base"]["id"], {})
        except (OSError, KeyError, TypeError):
            raise RunFailed(
                f"{folder / CARD_FILE} does not say recipe.name and base.id, as wardrobe train "
                "writes them. Push the model as a version, and extract from that."
            ) from None


def extract(
    source: FineTune, base: BaseModel, runs: Path, wanted: Extraction, *, progress: Report
) -> TrainedAdapter:
    """Make, or find again, the adapter of a fine-tuned model, in a run of its own.

    Raises RunFailed where nothing has changed.
    """
    model_sha256 = as_model(base, source.folder).fingerprint
    facts = {
        "extract": model_sha256,
        "base": base.fingerprint,
        "rank": wanted.rank,
        "energy": wanted.energy,
        "versions": {"torch": version("torch")},
    }
    with open_run(runs, facts) as run:
        reused = run.finished
        if not reused:
            factors, left_out = _factorise_all(source.folder, base, wanted, progress)
            prepared = run.prepare()
            write_lora(PlainLora.of_factors(factors), base.id, prepared)
            made_of = {"model_sha256": model_sha256, **source.version}
            summary = _summary(factors, left_out, wanted) | {"of": made_of}
            write_card(prepared, _card(read_card(source.folder), summary))
            run.publish(prepared)
        return TrainedAdapter(run.adapter, read_card(run.adapter), 0, reused, None)


def _factorise_all(
    folder: Path, base: BaseModel, wanted: Extraction, progress: Report
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Return the factors of every linear that changed, and the energy of all that is left out."""
    before, after = read_folder(base.path), read_folder(folder)
    kind = read_base_config(base.path).get("model_type", "")
    factors: dict[str, LowRank] = {}
    left_out: dict[str, float] = {}
    for done, name in enumerate(sorted(before)):
        progress(Progress("extract", done, len(before)))
        module = module_of(name, kind)
        change = _read(after[name]) - _read(before[name])
        if module not in base.linears or module.endswith("lm_head"):
            left_out[name] = float(change.double().square().sum())
        elif change.any():
            change = change.t() if kind in TRANSPOSED else change
            factors[module] = factorise(change, wanted.rank, wanted.energy)
    progress(Progress("extract", len(before), len(before)))
    if not factors:
        raise RunFailed(f"No linear layer of {folder} differs from {base.id}: there is no adapter.")
    return factors, left_out


def _read(tensor: Tensor) -> torch.Tensor:
    with safe_open(tensor.path, framework="pt") as file:
        return file.get_tensor(tensor.name).float()


def _summary(
    factors: Mapping[str, LowRank], left_out: Mapping[str, float], wanted: Extraction
) -> dict[str, Any]:
    """Return what the card says of an extraction; every energy as a share."""
    linear = math.fsum(part.energy for part in factors.values())
    other = math.fsum(left_out.values())
    kinds: dict[str, list[LowRank]] = defaultdict(list)
    for module, part in factors.items():
        kinds[module.rsplit(".", 1)[-1]].append(part)
    return {
        "rank": wanted.rank,
        "energy": wanted.energy,
        "kept": _kept(factors.values()),
        "modules": {
            kind: {"kept": _kept(parts), "highest_rank": max(part.rank for part in parts)}
            for kind, parts in sorted(kinds.items())
        },
        "left_out": {
            "share": round(other / (linear + other), 4),
            "tensors": sum(energy > 0 for energy in left_out.values()),
        },
    }


def _kept(parts: Iterable[LowRank]) -> float:
    parts = list(parts)
    return round(math.fsum(p.kept for p in parts) / math.fsum(p.energy for p in parts), 4)


def _card(source: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the card of the adapter: the fine-tune's own lineage, and what became of it."""
    gate = source.get("gate", {}) | {"passed": False, "failures": [NOT_EVALUATED]}
    lineage = source.get("lineage", {}) | {"extracted": summary}
    return source | {"metrics": {}, "gate": gate, "lineage": lineage}
