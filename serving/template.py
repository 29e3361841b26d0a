"""What a base's chat template does with tools: it is asked, not guessed.

The template renders calls, and the format that reads them back is its own.
"""

import json
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from registry.chat import ChatEncoder
from serving.calls import FORMATS, CallDelta, CallFormat, CallParser
from serving.tools import Tool

_TOOL = Tool("probe_tool", {"type": "object", "properties": {"key": {"type": "string"}}})
_ARGUMENTS = {"key": "value"}
_QUESTION = {"role": "user", "content": "?"}


@dataclass(frozen=True, slots=True)
class ToolTemplate:
    """A template that has tools."""

    form: CallFormat
    several: bool  # a message may hold several calls


def ask_template(chat: ChatEncoder) -> ToolTemplate | None:
    """Return how the template has tools; None: not at all, or in no form that is known."""
    form = next((form for form in FORMATS if _reads(form, chat, 1)), None)
    return ToolTemplate(form, _reads(form, chat, 2)) if form else None


def _reads(form: CallFormat, chat: ChatEncoder, count: int) -> bool:
    """Tell whether the format reads as many calls as the template was given."""
    parser = CallParser(form, frozenset({_TOOL.name}))
    events = [*parser.push(_render(chat, count)), *parser.finish()]
    written = [""] * parser.calls
    for event in events:
        if isinstance(event, CallDelta):
            written[event.index] += event.arguments
    try:
        return [json.loads(text) for text in written] == [_ARGUMENTS] * count
    except ValueError:
        return False


def _render(chat: ChatEncoder, count: int) -> str:
    """Return what the template writes for an answer of that many calls; empty: it takes none."""
    calls = [_call(number) for number in range(count)]
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
    try:
        asked = chat.text([_QUESTION], [_TOOL.described])
        told = chat.text([_QUESTION, answer], [_TOOL.described], answer=False)
    except (TemplateError, TypeError, ValueError):
        return ""
    return told.removeprefix(asked) if _TOOL.name in asked else ""


def _call(number: int) -> dict[str, Any]:
    function = {"name": _TOOL.name, "arguments": _ARGUMENTS}
    # Nine characters: Mistral's templates take no other ids.
    return {"id": f"call0000{number}", "type": "function", "function": function}
