"""Preference training: pairs of a better and a worse answer, by direct preference optimisation.

The loss and its bookkeeping are TRL's; the tokens are ours, as for every other run. The reference
is the base itself: the model with its adapter off. (Rafailov et al. 2023, arXiv 2305.18290.)
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from transformers import Trainer, TrainerCallback

from registry.jsonfile import canonical
from training.arguments import one_device
from training.batches import Sample, Schedule
from training.data.duplicates import normalise
from training.data.examples import Data, ask
from training.errors import DataError, RecipeError
from training.prompt import Prompter
from training.recipe import Preference, Recipe


class PairRow(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the file."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with the answer to prefer and the one to avoid."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of a file, and what a card says of them."""

    pairs: tuple[Pair, ...]
    lineage: Mapping[str, Any]


def read_pairs(recipe: Recipe, preference: Preference, data: Data, prompter: Prompter) -> Pairs:
    """Read and encode the pairs of a recipe.

    Raises DataError naming the line: when it is no pair, is longer than train.max_length, or asks
    what is held out or validates. Raises RecipeError without the extra.
    """
    _check_installed()
    path = recipe.folder / preference.path
    judged = data.judged_prompts()
    pairs: list[Pair] = []
    for number, row in _rows(path):
        if normalise(row.prompt) in judged:
            raise DataError(
                f"Line {number} of {path} asks what is held out or validates: "
                f"{row.prompt[:60]!r}. Take it out, or the evaluation measures memory."
            )
        chosen, rejected = (
            _sample(row.prompt, answer, prompter) for answer in (row.chosen, row.rejected)
        )
        longest = max(len(chosen.ids), len(rejected.ids))
        if longest > recipe.train.max_length:
            raise DataError(
                f"Line {number} of {path} has {longest} tokens, more than train.max_length = "
                f"{recipe.train.max_length}. Raise it, or shorten the pair."
            )
        pairs.append(Pair(chosen, rejected))
    if not pairs:
        raise DataError(f"{path} holds no pair.")
    rows = [[list(pair.chosen.ids), list(pair.rejected.ids)] for pair in pairs]
    lineage = {
        "preference_beta": preference.beta,
        "pairs": len(pairs),
        "pairs_sha256": sha256(canonical(rows)).hexdigest(),
    }
    return Pairs(tuple(pairs), lineage)


def preference_trainer(
    model: Any,
    arguments: dict[str, Any],
    preference: Preference,
    pairs: Schedule[Pair],
    prompter: Prompter,
    callbacks: Sequence[TrainerCallback],
) -> Trainer:
    """Return TRL's trainer over the pairs in their order."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class PairTrainer(DPOTrainer):
        """TRL's trainer on rows that are token ids already: its own would end with a newline."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            return dataset

        def train(self, *args: Any, **kwargs: Any) -> Any:
            with _names_of_before():
                return super().train(*args, **kwargs)

    arguments |= {
        "beta": preference.beta,
        "disable_dropout": False,  # the recipe says how much there is
        "gradient_checkpointing": False,  # TRL's default would compute everything twice
        "max_length": None,  # nothing is ever cut
    }
    with _names_of_before():
        trainer = PairTrainer(
            model=model,
            args=one_device(DPOConfig(**arguments)),
            train_dataset=Dataset.from_list([_ids(pair) for pair in pairs]),
            processing_class=prompter.tokenizer,
            callbacks=list(callbacks),
        )
    # TRL copies the adapter to be the reference; a fresh one is the base, so "off" says the same.
    model.delete_adapter("ref")
    return trainer


def _check_installed() -> None:
    for package in ("trl", "datasets"):
        if find_spec(package) is None:
            raise RecipeError(
                f"[preference] needs the package {package!r}, which is not installed. Install the "
                "extra: pip install 'wardrobe[dpo]'."
            )


@contextmanager
def _names_of_before() -> Iterator[None]:
    """TRL 1.16 uses names that transformers 5.23 changed; nobody here can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
        yield


def _rows(path: Path) -> list[tuple[int, PairRow]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"preference.path cannot be read: {error}.") from error
    rows: list[tuple[int, PairRow]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((number, msgspec.json.decode(line, type=PairRow)))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"Line {number} of {path} is no {{prompt, chosen, rejected}}: {error}."
                ) from error
    return rows


def _sample(prompt: str, answer: str, prompter: Prompter) -> Sample:
    example = ask(prompt, answer, "")
    ids, completion = prompter.encode(example)
    return Sample(example, ids + completion, len(ids))


def _ids(pair: Pair) -> dict[str, list[int]]:
    start = pair.chosen.prompt_length
    return {
        "prompt_ids": list(pair.chosen.ids[:start]),
        "chosen_ids": list(pair.chosen.ids[start:]),
        "rejected_ids": list(pair.rejected.ids[start:]),
    }
