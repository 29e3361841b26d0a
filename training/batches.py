"""Token batches: prompts with their answers, the loss on the answers only.

The mask is made by position. Masking by token id would hide the end of the turn too where a base
uses one token for it and for padding, and the model would never learn to stop.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import Dataset

from training.data.examples import Example
from training.errors import DataError
from training.prompt import Prompter
from training.recipe import Train

IGNORED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: the prompt's ids, then the answer's."""

    example: Example
    ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (IGNORED,) * self.prompt_length + self.ids[self.prompt_length :]


@dataclass(frozen=True, slots=True)
class MaskedSample:
    """What one training row looks like to people: what the loss ignores, and what it learns."""

    ignored: str
    learned: str


Row = TypeVar("Row")


class Schedule(Dataset[Row], Generic[Row]):
    """Every row of the whole run in the order it is used, so that a resumed run continues it.

    `rows` of `items`, each once before any comes twice. A `share` of the rows, evenly spread, are
    `others` instead.
    """

    def __init__(
        self,
        items: Sequence[Row],
        rows: int,
        seed: int,
        others: Sequence[Row] = (),
        share: float = 0.0,
    ) -> None:
        mine, theirs = _endless(items, seed), _endless(others, seed)
        self._rows = [
            next(theirs if int((row + 1) * share) > int(row * share) else mine)
            for row in range(rows)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


def _endless(items: Sequence[Row], seed: int) -> Iterator[Row]:
    rng = random.Random(seed)  # noqa: S311  # an order, not a secret
    while True:
        epoch = list(items)
        rng.shuffle(epoch)
        yield from epoch


def encode_examples(
    examples: Sequence[Example], prompter: Prompter, train: Train
) -> tuple[list[Sample], int]:
    """Return the samples and how many were too long, where the recipe says to drop those.

    Raises DataError naming the rows that are too long, where it does not. Nothing is ever cut.
    """
    samples: list[Sample] = []
    too_long: list[str] = []
    for example in examples:
        prompt, completion = prompter.encode(example)
        if len(prompt) + len(completion) > train.max_length:
            too_long.append(f"{len(prompt) + len(completion)} tokens: {example.text[:60]!r}")
        else:
            samples.append(Sample(example, prompt + completion, len(prompt)))
    if too_long and train.too_long == "error":
        raise DataError(
            f"{len(too_long)} examples are longer than train.max_length = {train.max_length} "
            f"tokens: {'; '.join(too_long[:3])}. Raise train.max_length, shorten them, or set "
            'train.too_long = "drop".'
        )
    if not samples:
        raise DataError(f"Every example is longer than {train.max_length} tokens.")
    return samples, len(too_long)


def collate(samples: Sequence[Sample], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right. Every tensor is [batch, length]."""
    length = max(len(sample.ids) for sample in samples)
    ids, labels, mask = [], [], []
    for sample in samples:
        padding = length - len(sample.ids)
        ids.append([*sample.ids, *[pad_id] * padding])
        labels.append([*sample.labels, *[IGNORED] * padding])
        mask.append([1] * len(sample.ids) + [0] * padding)
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def masked_sample(samples: Sequence[Sample], prompter: Prompter) -> MaskedSample:
    """Decode the first row as the loss sees it, and make sure of what it sees.

    The row goes through the collator beside the longest one, so that padding is in it too.
    """
    sample, longest = samples[0], max(samples, key=lambda sample: len(sample.ids))
    batch = collate([sample, longest], prompter.end_of_turn)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = ids[labels != IGNORED].tolist()
    ignored = ids[: sample.prompt_length].tolist()
    assert learned == labels[labels != IGNORED].tolist(), "labels are the tokens themselves"
    assert tuple(learned) == prompter.completion_ids(sample.example.completion), "all of the answer"
    assert tuple(ignored) == prompter.prompt_ids(sample.example.turns), "nothing of the prompt"
    decode = prompter.tokenizer.decode
    return MaskedSample(str(decode(ignored)), str(decode(learned)))
