"""General text and questions, of no domain: what a specialised model should still be able to do."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from training.errors import DataError
from training.recipe import Recipe

BUILT_IN = Path(__file__).parent / "general"  # sentences and questions written for this purpose
MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the texts of which a right answer contains one, as whole words."""

    question: str
    answers: tuple[str, ...]

    def answered_by(self, text: str) -> bool:
        return any(
            re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE)
            for answer in self.answers
        )


@dataclass(frozen=True, slots=True)
class General:
    """What the forgetting suite reads and asks."""

    texts: tuple[str, ...]
    questions: tuple[Question, ...]

    def half(self) -> "General":
        """Return every second of both, where at least two are left: an interval needs them."""
        texts, questions = self.texts[::2], self.questions[::2]
        return General(
            texts if len(texts) > 1 else self.texts,
            questions if len(questions) > 1 else self.questions,
        )


def general_of(recipe: Recipe) -> General:
    """Read the files that the recipe names, and the built-in ones in place of those it does not."""
    text, questions = recipe.task.general_text, recipe.task.general_questions
    return load_general(
        recipe.folder / text if text else None, recipe.folder / questions if questions else None
    )


def load_general(texts: Path | None = None, questions: Path | None = None) -> General:
    """Read a text file, one text a line, and a JSONL file of questions; or the built-in ones.

    Raises DataError naming the line that is wrong, or a file with fewer than two entries.
    """
    return General(
        _read_texts(texts or BUILT_IN / "sentences.txt"),
        _read_questions(questions or BUILT_IN / "questions.jsonl"),
    )


def _read_texts(path: Path) -> tuple[str, ...]:
    lines = tuple(line for _, line in _lines(path))
    if len(lines) < 2:
        raise DataError(f"{path} has {len(lines)} texts; an interval needs at least two lines.")
    return lines


def _read_questions(path: Path) -> tuple[Question, ...]:
    found: list[Question] = []
    for number, line in _lines(path):
        try:
            question = msgspec.convert(json.loads(line), Question)
        except (ValueError, msgspec.ValidationError) as error:
            raise DataError(
                f"{path}:{number} is no question: {error}. Write a line as "
                '{"question": "…?", "answers": ["…"]}.'
            ) from error
        if not question.question.strip() or not all(a.strip() for a in question.answers or ("",)):
            raise DataError(f"{path}:{number} needs a question and at least one answer.")
        found.append(question)
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} questions; an interval needs at least two.")
    return tuple(found)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, line) of every line that is not blank."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is over {MAX_BYTES >> 20} MiB: give a sample of it.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error
    return [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
