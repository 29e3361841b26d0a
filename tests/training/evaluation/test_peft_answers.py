"""What the engine cannot wear is answered by PEFT, in batches, as one prompt at a time would be."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy

from registry.base import BaseModel
from tests.tiny import EOS_ID, make_adapter, peft_on_new_transformers
from training.adapter_files import write_as_peft
from training.evaluation import peft_answers
from training.evaluation.evaluate import Ask
from training.evaluation.forward import Row, load_reader
from training.evaluation.peft_answers import with_peft
from training.model import Hardware, load_base, peft_config, peft_without_advice
from training.recipe import Method, MethodKind

WORDS = 6
PROMPTS = [tuple(range(start, start + length)) for start, length in ((3, 5), (60, 17), (99, 5))]


@pytest.fixture(autouse=True)
def fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a batch and a single row may part at a near tie."""
    monkeypatch.setattr(peft_answers, "detect_hardware", lambda: Hardware("cpu", "float32", 1))


def random_adapter(kind: MethodKind, folder: Path, base: BaseModel) -> Path:
    with peft_on_new_transformers():
        model: Any = get_peft_model(
            load_base(base.path, "float32"), peft_config(Method(kind=kind, tokens=4))
        )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += torch.randn(weight.shape, generator=generator)
    write_as_peft(model, base.id, folder)
    return folder


def alone(prompt: tuple[int, ...], folder: Path, base: BaseModel) -> list[int]:
    """Take the likeliest token again and again, without a batch, padding, cache or `generate`."""
    with peft_without_advice():
        model = PeftModel.from_pretrained(load_base(base.path, "float32"), str(folder)).eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + WORDS and (len(ids) == len(prompt) or ids[-1] != EOS_ID):
        row = torch.tensor([ids])
        with torch.no_grad(), peft_without_advice():
            logits = model(input_ids=row, attention_mask=torch.ones_like(row)).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", ["ia3", "prompt-tuning", "prefix-tuning"])
def test_a_batch_answers_like_each_prompt_alone(
    kind: MethodKind, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = random_adapter(kind, tmp_path / "adapter", tiny_base)
    counts: list[int] = []
    asks = [(prompt, folder) for prompt in PROMPTS]
    said = peft_answers.answer_by_peft(tiny_base, asks, WORDS, counts.append)
    assert said == [alone(prompt, folder, tiny_base) for prompt in PROMPTS]
    assert counts[-1] == len(PROMPTS)


@pytest.mark.parametrize("kind", ["prompt-tuning", "prefix-tuning"])
def test_losses_behind_virtual_tokens_are_those_that_peft_gives(
    kind: MethodKind, tiny_base: BaseModel, tmp_path: Path
) -> None:
    folder = random_adapter(kind, tmp_path / "adapter", tiny_base)
    rows = [Row(tuple(range(5, 5 + length)), 1 + length // 3) for length in (40, 3, 17, 2)]
    with load_reader(tiny_base, folder, Hardware("cpu", "float32", 1)) as reader:
        found = reader.losses(rows)
        for row, nats in zip(rows, found, strict=True):
            with torch.no_grad():
                logits = reader.model(input_ids=torch.tensor([row.ids])).logits[0, -len(row.ids) :]
            targets = torch.tensor(row.ids[row.start :])
            alone = cross_entropy(logits[row.start - 1 : -1], targets, reduction="sum")
            assert nats == pytest.approx(float(alone), rel=1e-4)


def test_the_engine_gets_all_it_can_wear_and_every_answer_finds_its_place(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    ia3 = random_adapter("ia3", tmp_path / "ia3", tiny_base)
    lora = make_adapter(tmp_path / "lora", tiny_base.path)
    heard: list[Path | None] = []

    def engine(
        model: BaseModel, asks: Sequence[Ask], tokens: int, done: Callable[[int], None]
    ) -> list[list[int]]:
        heard.extend(folder for _, folder in asks)
        done(len(asks))
        return [[-1]] * len(asks)

    asks = [(PROMPTS[0], folder) for folder in (ia3, None, lora, ia3)]
    counts: list[int] = []
    said = with_peft(engine)(tiny_base, asks, WORDS, counts.append)
    expected = alone(PROMPTS[0], ia3, tiny_base)
    assert said == [expected, [-1], [-1], expected]
    assert heard == [None, lora]
    assert counts == [2, 4]
