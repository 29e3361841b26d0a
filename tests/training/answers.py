"""A base that answers for itself, by transformers' own greedy generation, one prompt at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from registry.base import BaseModel
from training.evaluation.evaluate import Ask


def answer_with_transformers(
    model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
) -> list[list[int]]:
    base: Any = AutoModelForCausalLM.from_pretrained(model.path)
    outputs: list[list[int]] = []
    for prompt, adapter in asks:
        assert adapter is None, "only the base is asked"
        ids = base.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        outputs.append([token for token in ids if token != base.config.eos_token_id])
        done(len(outputs))
    return outputs
