from dataclasses import replace
from pathlib import Path

import pytest

from registry.base import BaseModel
from tests.tiny import EOS, EOS_ID
from training.batches import IGNORED, Schedule, collate, encode_examples, masked_sample
from training.data.examples import Data, ask
from training.errors import BaseUnavailable, DataError
from training.prompt import load_prompter
from training.recipe import Recipe


def test_the_loss_sees_the_answer_and_its_stop_token_once_though_padding_is_the_same_token(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    examples = [ask("a", "b", ""), ask("a much longer question", "a longer answer", "")]
    samples, _ = encode_examples(examples, prompter, recipe.train)
    batch = collate(samples, prompter.end_of_turn)
    short = batch["labels"][0]
    assert prompter.end_of_turn == prompter.tokenizer.pad_token_id == EOS_ID
    assert short[short != IGNORED].tolist() == [ord("b"), EOS_ID]
    assert batch["input_ids"][0, -1] == EOS_ID, "this row is padded"
    assert batch["attention_mask"].sum(1).tolist() == [len(sample.ids) for sample in samples]


def test_the_shown_sample_is_the_rendered_prompt_and_the_answer(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    samples, _ = encode_examples(data.train, prompter, recipe.train)
    shown = masked_sample(samples, prompter)
    assert shown.ignored == (
        f"<|im_start|>system\nSay the colour.{EOS}\n<|im_start|>user\ngrass 0{EOS}\n"
        "<|im_start|>assistant\n"
    )
    assert shown.learned == f"blue{EOS}"


def test_the_shown_sample_asserts_on_a_wrong_mask(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    samples, _ = encode_examples(data.train, prompter, recipe.train)
    shifted = [replace(s, prompt_length=s.prompt_length + 1) for s in samples]
    with pytest.raises(AssertionError):
        masked_sample(shifted, prompter)


def test_an_answer_that_holds_the_stop_token_is_refused(
    recipe: Recipe, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    with pytest.raises(DataError, match="stop token"):
        encode_examples([ask("a", f"b{EOS}c", "")], prompter, recipe.train)


def test_a_base_without_chat_template_is_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((tiny_base.path / name).read_bytes())
    with pytest.raises(BaseUnavailable, match="chat template"):
        load_prompter(tmp_path, "x")


def test_a_schedule_uses_every_row_once_an_epoch_in_a_seeded_order(
    recipe: Recipe, data: Data, tiny_base: BaseModel
) -> None:
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    samples, _ = encode_examples(data.train, prompter, recipe.train)
    schedule = Schedule(samples, 20, seed=0)
    rows = [schedule[index].ids for index in range(len(schedule))]
    everything = sorted(sample.ids for sample in samples)
    assert sorted(rows[:9]) == sorted(rows[9:18]) == everything
    assert len(rows) == 20
    assert rows != [Schedule(samples, 20, seed=1)[index].ids for index in range(20)]
