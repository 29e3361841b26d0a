"""What a run is fed: rows in the order of their use, and rows it is only measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.batches import MaskedSample, Sample, Schedule, encode_examples, masked_sample
from training.data.duplicates import normalise
from training.data.examples import Data
from training.errors import DataError, RecipeError
from training.evaluation.general import general_of
from training.preference import Pair, read_pairs
from training.prompt import Prompter
from training.recipe import Recipe
from training.replay import Replayed


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one run."""

    train: Schedule[Any]  # of samples, or of pairs where the recipe has a preference
    validation: Sequence[Sample]
    shown: MaskedSample  # the first row as the loss sees it
    dropped: int  # examples too long, where the recipe says to drop them
    lineage: Mapping[str, Any]  # of what is not in the data: answers of the base, or pairs

    def sample(self, index: int) -> Sample:
        """Return a row as the model reads it; of a pair, the better one."""
        row = self.train[index]
        return row.chosen if isinstance(row, Pair) else row


def make_rows(recipe: Recipe, data: Data, prompter: Prompter, replayed: Replayed) -> Rows:
    """Encode and order the rows. Raises RecipeError, or DataError naming rows that do not fit."""
    if recipe.train.eval_every is not None and not data.validation:
        raise RecipeError(
            f"train.eval_every = {recipe.train.eval_every} looks at validation examples, and this "
            "recipe keeps none. Set data.validation, the share of the groups to look at."
        )
    count = recipe.train.steps * recipe.train.batch_size
    if recipe.preference is not None:
        pairs = read_pairs(recipe, recipe.preference, data, prompter)
        shown = masked_sample([pair.chosen for pair in pairs.pairs], prompter)
        return Rows(Schedule(pairs.pairs, count, recipe.seed), (), shown, 0, pairs.lineage)
    _refuse_judged(recipe, data, replayed)
    samples, dropped = encode_examples(data.train, prompter, recipe.train)
    validation: list[Sample] = []
    if recipe.train.eval_every is not None:
        validation, too_long = encode_examples(data.validation, prompter, recipe.train)
        dropped += too_long
    shown = masked_sample(samples, prompter)
    share = recipe.replay.share if recipe.replay else 0.0
    schedule = Schedule(samples, count, recipe.seed, replayed.samples, share)
    return Rows(schedule, validation, shown, dropped, replayed.lineage)


def _refuse_judged(recipe: Recipe, data: Data, replayed: Replayed) -> None:
    """Raise DataError where a replayed question is one that measures the task or forgetting."""
    if not replayed.samples:
        return
    general = {normalise(question.question) for question in general_of(recipe).questions}
    judged = data.judged_prompts() | general
    for sample in replayed.samples:
        if normalise(sample.example.text) in judged:
            raise DataError(
                f"replay.source asks {sample.example.text[:60]!r}, which is held out, validates, "
                "or measures forgetting. Take it out, or the evaluation measures memory."
            )
