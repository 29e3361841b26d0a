"""The engines a command asks: training serves nothing, so `wardrobe.py` hands their maker in."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

import typer

from registry.base import BaseModel

if TYPE_CHECKING:
    from training.evaluation.evaluate import Answer, Ask


class Engines(Protocol):
    """Engines for as long as somebody asks; closing them frees their memory."""

    def answer(
        self,
        model: BaseModel,
        asks: "Sequence[Ask]",
        max_new_tokens: int,
        done: Callable[[int], None],
    ) -> list[list[int]]: ...

    def close(self) -> None: ...


@contextmanager
def open_engines(context: typer.Context) -> "Generator[Answer]":
    """Yield an Answer whose engines stay for all its calls."""
    from training.evaluation.peft_answers import with_peft

    make: Callable[[], Engines] = context.obj
    with closing(make()) as engines:
        yield with_peft(engines.answer)


def answer_once(context: typer.Context) -> "Answer":
    """Return an Answer whose engines are gone after each call: training has the memory then."""

    def answer(
        model: BaseModel,
        asks: "Sequence[Ask]",
        max_new_tokens: int,
        done: Callable[[int], None],
    ) -> list[list[int]]:
        with open_engines(context) as asked:
            return asked(model, asks, max_new_tokens, done)

    return answer
