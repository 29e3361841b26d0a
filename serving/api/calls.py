"""Calls of tools in an answer, as the OpenAI API writes them."""

import secrets
import string
from collections.abc import Sequence
from typing import Any

from serving.calls import CallDelta, Event

_ID_LETTERS = string.ascii_letters + string.digits


def delta_of(event: Event) -> dict[str, Any]:
    """Return what a chunk of a stream says: the name of a call comes first and with its id."""
    if isinstance(event, str):
        return {"content": event}
    if not event.name:
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}
    return {"tool_calls": [{"index": event.index, **_call(event.name, event.arguments)}]}


def message_of(events: Sequence[Event]) -> dict[str, Any]:
    """Return the fields of a whole message; `tool_calls` only where there are any."""
    names: list[str] = []
    arguments: list[list[str]] = []  # in pieces: a sum would be copied for each
    for event in events:
        if isinstance(event, CallDelta) and event.name:
            names.append(event.name)
            arguments.append([])
        if isinstance(event, CallDelta):
            arguments[event.index].append(event.arguments)
    calls = [_call(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
    content = "".join(event for event in events if isinstance(event, str))
    return {"content": content or None, "tool_calls": calls} if calls else {"content": content}


def finish_reason(reason: str, called: bool) -> str:
    return "tool_calls" if called and reason == "stop" else reason


def _call(name: str, arguments: str) -> dict[str, Any]:
    # Nine letters and digits: what Mistral's templates insist on when it comes back as history.
    new_id = "".join(secrets.choice(_ID_LETTERS) for _ in range(9))
    function = {"name": name, "arguments": arguments}
    return {"id": new_id, "type": "function", "function": function}
