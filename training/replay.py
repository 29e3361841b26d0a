"""Self-replay: general questions with the base's own answers among the rows of a run.

A model that is only ever shown one domain answers everything in its form. A share of rows that
the base answered itself, under another system prompt than the domain's, keeps it from that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from registry.base import BaseModel
from registry.jsonfile import canonical
from training.batches import Sample
from training.data.examples import ask
from training.data.general import QUESTIONS
from training.errors import DataError, RecipeError
from training.evaluation.evaluate import Answer
from training.progress import Progress, Report
from training.prompt import Prompter, load_prompter
from training.recipe import OWN_QUESTIONS, Recipe, Replay


@dataclass(frozen=True, slots=True)
class Replayed:
    """General questions as the base answers them: rows, and what a card says of them."""

    samples: tuple[Sample, ...]
    lineage: Mapping[str, Any]


def replay_rows(
    recipe: Recipe, base: BaseModel, answer: Answer | None, progress: Report
) -> Replayed:
    """Let the base answer the questions of a recipe's [replay], greedily; no rows without one.

    The rows are the very tokens the base said: an answer that was cut at max_new_tokens does not
    teach to stop there. Raises DataError when the source cannot be read, or rows are too long.
    """
    replay = recipe.replay
    if replay is None:
        return Replayed((), {})
    if answer is None:
        raise RecipeError("[replay] needs somebody to answer for the base: give train() an answer.")
    questions = read_questions(recipe, replay)
    prompter = load_prompter(base.path, replay.system)
    examples = [ask(question, "", "replay") for question in questions]
    prompts = [prompter.prompt_ids(example.turns) for example in examples]

    def done(count: int) -> None:
        progress(Progress("replay", count, len(prompts)))

    done(0)
    outputs = answer(base, [(ids, None) for ids in prompts], replay.max_new_tokens, done)
    samples = tuple(
        _sample(question, prompt, output, prompter, replay.max_new_tokens)
        for question, prompt, output in zip(questions, prompts, outputs, strict=True)
    )
    longest = max(len(sample.ids) for sample in samples)
    if longest > recipe.train.max_length:
        raise DataError(
            f"A replayed answer has {longest} tokens with its question, more than "
            f"train.max_length = {recipe.train.max_length}. Raise it, or lower "
            f"replay.max_new_tokens = {replay.max_new_tokens}."
        )
    lineage = {
        "replay_share": replay.share,
        "replay_examples": len(samples),
        "replay_sha256": sha256(canonical([list(sample.ids) for sample in samples])).hexdigest(),
    }
    return Replayed(samples, lineage)


def _sample(
    question: str, prompt: Sequence[int], output: Sequence[int], prompter: Prompter, limit: int
) -> Sample:
    """Return one row; engines leave the stop token out, so an answer below the limit gets it."""
    ended = len(output) < limit
    said = (*output, prompter.end_of_turn) if ended else tuple(output)
    example = ask(question, prompter.answer(output), "replay")
    return Sample(example, (*prompt, *said), len(prompt))


def read_questions(recipe: Recipe, replay: Replay) -> Sequence[str]:
    """Return our own general questions, or those of a file: a line each, or {"prompt": …} each."""
    if replay.source == OWN_QUESTIONS:
        return QUESTIONS
    path = recipe.folder / replay.source
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"replay.source = {replay.source!r} cannot be read: {error}. It is 'general', or a "
            ".txt or .jsonl file relative to the recipe."
        ) from error
    lines = [line for line in lines if line.strip()]
    questions = [_prompt_of(line, path) for line in lines] if path.suffix == ".jsonl" else lines
    if not questions:
        raise DataError(f"{path} holds no question to replay.")
    return questions


def _prompt_of(line: str, path: Path) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{path} has a line that is not {{"prompt": text}}: {line[:80]!r}.')
    return prompt
