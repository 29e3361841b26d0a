"""The prompt of a version: what goes before the messages of every request that it answers."""

from collections.abc import Sequence

from registry.adapter import Shot
from serving.tokens import ChatMessage


def put_before(
    messages: Sequence[ChatMessage], system_prompt: str, examples: Sequence[Shot]
) -> list[ChatMessage]:
    """Return the messages after the version's system text and examples.

    A request that has a system text of its own keeps it; the examples follow it as turns, as if
    the conversation had begun with them.
    """
    given = list(messages)
    if system_prompt and not any(message.role == "system" for message in given):
        given.insert(0, ChatMessage("system", system_prompt))
    start = next((i for i, m in enumerate(given) if m.role != "system"), len(given))
    turns = [
        turn
        for said, answer in examples
        for turn in (ChatMessage("user", said), ChatMessage("assistant", answer))
    ]
    return [*given[:start], *turns, *given[start:]]
