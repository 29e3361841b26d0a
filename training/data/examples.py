"""Words of the data: an example, the group it belongs to, and the split into disjoint sides."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from registry.jsonfile import canonical
from training.data.duplicates import normalise

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. The system prompt is the recipe's, never a turn."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked, what is to be answered, and what it must not be separated from."""

    turns: tuple[Turn, ...]  # ends with the user's
    completion: str
    group: str  # examples of one group are all on the same side of the split
    where: str = field(default="", compare=False)  # FILE:LINE; a builder's have none

    @property
    def text(self) -> str:
        """The last thing the user said."""
        return self.turns[-1].content

    @property
    def prompt(self) -> str:
        """Everything that was said before the answer, a turn a line."""
        return "\n".join(turn.content for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Data:
    """Sides that share no group and no text."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    duplicates: int  # training examples left out: the same text is held out, or came before
    digest: str  # sha256 hex over the sides, in order
    validation: tuple[Example, ...] = ()  # to choose by, so that nothing is chosen on held_out
    near_duplicates: int = 0  # left out by data.selection.near_duplicates

    def judged_prompts(self) -> frozenset[str]:
        """Return what no row of any kind may ask, without differences of case and spacing."""
        return frozenset(normalise(e.prompt) for e in (*self.validation, *self.held_out))


def ask(text: str, completion: str, group: str) -> Example:
    """Make an example of one question and its answer."""
    return Example((Turn("user", text),), completion, group)


def digest_examples(
    train: Iterable[Example], held_out: Iterable[Example], validation: Iterable[Example] = ()
) -> str:
    """Hash every turn, completion and group of the sides, in order."""
    hasher = hashlib.sha256()
    for side, examples in (("train", train), ("held_out", held_out), ("validation", validation)):
        for example in examples:
            turns = [[turn.role, turn.content] for turn in example.turns]
            row = [side, turns, example.completion, example.group]
            hasher.update(canonical(row) + b"\n")
    return hasher.hexdigest()
