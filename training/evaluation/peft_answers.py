"""Answers of adapters that the serving engine cannot wear, by PEFT's own generate.

Slower than the engine, one adapter after the other; with the same greedy rule and the same ends.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from registry.base import BaseModel
from registry.contents import CONFIG_NAME
from training.evaluation.evaluate import Answer, Ask
from training.evaluation.forward import load_reader
from training.model import detect_hardware
from training.prompt import stop_ids

BATCH = 16


def with_peft(engine: Answer) -> Answer:
    """Return an `Answer` that leaves to `engine` all it can wear, and asks PEFT for the rest."""

    def run(
        model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        slow = [place for place, (_, folder) in enumerate(asks) if folder and not is_lora(folder)]
        if not slow:
            return engine(model, asks, max_new_tokens, done)
        fast = [place for place in range(len(asks)) if place not in set(slow)]
        answers: dict[int, list[int]] = {}
        for places, answer in ((fast, engine), (slow, answer_by_peft)):
            if not places:  # no engine is started for nothing
                continue
            before = len(answers)
            told = [asks[place] for place in places]
            said = answer(model, told, max_new_tokens, lambda n, before=before: done(before + n))
            answers |= dict(zip(places, said, strict=True))
        return [answers[place] for place in range(len(asks))]

    return run


def is_lora(folder: Path) -> bool:
    return json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["peft_type"] == "LORA"


def answer_by_peft(
    model: BaseModel, asks: Sequence[Ask], max_new_tokens: int, done: Callable[[int], None]
) -> list[list[int]]:
    """Return the greedy output ids of each ask, in order; `done` hears how many have ended."""
    tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    stops = sorted(stop_ids(model.path, tokenizer))
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(asks)), key=lambda place: str(asks[place][1]))
    for folder, group in groupby(order, key=lambda place: asks[place][1]):
        with load_reader(model, folder, detect_hardware()) as worn:
            for batch in _batches(asks, list(group)):
                prompts = [asks[place][0] for place in batch]
                said = _generate(worn.model, prompts, max_new_tokens, stops)
                answers |= dict(zip(batch, said, strict=True))
                done(len(answers))
    return [answers[place] for place in range(len(asks))]


def _batches(asks: Sequence[Ask], places: list[int]) -> Iterator[list[int]]:
    """Yield places whose prompts have one length, so that nothing is padded.

    Padding on the left would come to stand between PEFT's virtual tokens and the prompt.
    """
    places.sort(key=lambda place: len(asks[place][0]))
    for _, same in groupby(places, key=lambda place: len(asks[place][0])):
        alike = list(same)
        yield from (alike[start : start + BATCH] for start in range(0, len(alike), BATCH))


def _generate(
    model: Any, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, stops: list[int]
) -> list[list[int]]:
    """Continue prompts of one length; each answer ends with its first stop token."""
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )
    return [_ended(row, stops) for row in output[:, ids.shape[1] :].tolist()]


def _ended(ids: list[int], stops: list[int]) -> list[int]:
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
