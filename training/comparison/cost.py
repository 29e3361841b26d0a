"""What a row costs: parameters, bytes, FLOPs, and what its processes took."""

import json
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from registry.base import BaseModel
from training.batches import encode_examples
from training.comparison.bench import Bench, Cell
from training.comparison.result import Cost
from training.model import peft_config, peft_without_advice
from training.recipe import Method


def cost_of_run(bench: Bench, cell: Cell, searched: Sequence[Cell], tokens: float) -> Cost:
    """Return what the run of a cell cost; `tokens` is the mean prompt of a request."""
    trainable = trainable_parameters(bench.base, cell.recipe.method)
    taken = cell.taken
    return Cost(
        prompt_tokens=tokens,
        trainable=trainable,
        bytes=bytes_of(cell.adapter),
        train_flops=train_flops(bench, cell, trainable),
        cpu_seconds=taken.cpu_seconds if taken else None,
        gpu_seconds=taken.gpu_seconds if taken else None,
        search_cpu_seconds=_sum([one.taken.cpu_seconds if one.taken else None for one in searched]),
        peak_bytes=(taken.gpu_peak_bytes or taken.peak_bytes) if taken else None,
    )


def cost_of_prompt(system: str, examples: Sequence[tuple[str, str]], tokens: float) -> Cost:
    """Return what a prompt costs: nothing is trained, its text is stored."""
    text = json.dumps([system, examples], ensure_ascii=False)
    return Cost(prompt_tokens=tokens, bytes=len(text.encode()) if examples else 0)


def train_flops(bench: Bench, cell: Cell, trainable: int) -> float:
    """Return the FLOPs of a run by the usual count, 2 a parameter and token for a pass forward.

    Backward costs the same again for the gradient of the activations, and once more for that of
    the weights that are trained: 6N a token for all N parameters, 4N + 6n for n new ones (J. Kaplan
    et al., Scaling Laws for Neural Language Models, 2020).
    """
    train = cell.recipe.train
    samples, _ = encode_examples(bench.data.train, bench.prompter, train)
    tokens = train.steps * train.batch_size * sum(len(s.ids) for s in samples) / len(samples)
    size = parameters_of(bench.base)
    full = cell.recipe.method.kind == "full"
    return tokens * (6 * size if full else 4 * size + 6 * trainable)


def parameters_of(base: BaseModel) -> int:
    """Count the parameters in the base's files; tied weights are stored once."""
    return sum(_parameters_in(path) for path in base.path.glob("*.safetensors"))


def trainable_parameters(base: BaseModel, method: Method) -> int:
    """Count what a method trains, on a model without memory.

    PiSSA, OLoRA and EVA train what LoRA trains; how they begin needs the base's numbers.
    """
    if method.kind in ("pissa", "olora", "eva"):
        method = replace(method, kind="lora")
    with torch.device("meta"), peft_without_advice():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
        if method.kind != "full":
            model = get_peft_model(model, peft_config(method))
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def bytes_of(folder: Path) -> int:
    """Return the bytes of the weights in a folder: what a version stores and ships."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _parameters_in(path: Path) -> int:
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]  # it has no stub
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # it is no mapping


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)
