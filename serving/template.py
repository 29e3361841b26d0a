"""What a base's chat template does with tools: it is asked, not guessed.

The template renders calls, and the format that reads them back is its own. Some templates teach
calls to the model and write none themselves (SmolLM 3, Granite 3): calls of the history go into
their text.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from registry.chat import ChatEncoder, Control
from serving.calls import FORMATS, GRANITE, HERMES, CallDelta, CallFormat, CallParser
from serving.tools import Tool

_TOOL = Tool("probe_tool", {"type": "object", "properties": {"key": {"type": "string"}}})
_ARGUMENTS = {"key": "value"}
_QUESTION = {"role": "user", "content": "?"}
_RESULT = "probe result"
_TAUGHT = (HERMES, GRANITE)  # formats of templates that write no calls


@dataclass(frozen=True, slots=True)
class ToolTemplate:
    """A template that has tools."""

    form: CallFormat
    several: bool  # a message may hold several calls
    in_text: bool = False  # it writes no calls: they are part of a message's text


def ask_template(chat: ChatEncoder) -> ToolTemplate | None:
    """Return how the template has tools; None: not at all, or in no form that is known."""
    one, two = (_render(chat, tool_calls=[_call(n) for n in range(count)]) for count in (1, 2))
    if form := next((form for form in FORMATS if _reads(form, one, 1)), None):
        return ToolTemplate(form, _reads(form, two, 2)) if _takes_results(chat) else None
    form = next((form for form in _TAUGHT if _teaches(form, chat)), None)
    if _TOOL.name in one or form is None:
        return None
    two = _render(chat, content="".join(calls_in_text(form, [(_TOOL.name, _ARGUMENTS)] * 2)))
    return ToolTemplate(form, several=True, in_text=True) if _reads(form, two, 2) else None


def calls_in_text(form: CallFormat, calls: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str, ...]:
    """Write calls of (name, arguments) as a model does that learned the format."""
    objects = [
        json.dumps({"name": name, form.arguments: arguments}, ensure_ascii=False)
        for name, arguments in calls
    ]
    opening, closing = Control(form.opening), Control(form.closing)
    if form.listed:
        return (opening, f"[{', '.join(objects)}]")
    return tuple(
        piece
        for number, each in enumerate(objects)
        for piece in ("\n" * bool(number), opening, f"\n{each}\n", closing)
    )


def _reads(form: CallFormat, told: str, count: int) -> bool:
    """Tell whether the format reads as many calls as the template was given."""
    if form.opening not in told and not form.bare:
        return False
    parser = CallParser(form, {_TOOL.name: _TOOL.parameters})
    events = [*parser.push(told), *parser.finish()]
    written = [""] * parser.calls
    for event in events:
        if isinstance(event, CallDelta):
            written[event.index] += event.arguments
    try:
        return [json.loads(text) for text in written] == [_ARGUMENTS] * count
    except ValueError:
        return False


def _teaches(form: CallFormat, chat: ChatEncoder) -> bool:
    """Tell whether the prompt says how to call, only where there are tools, and takes results."""
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _call(0)["id"]}
    asked = [_QUESTION, {"role": "assistant", "content": "."}, result]
    try:
        shown, plain = chat.text(asked, [_TOOL.described]), chat.text(asked)
    except (TemplateError, TypeError, ValueError):
        return False
    return form.opening in shown and form.opening not in plain and _RESULT in shown


def _takes_results(chat: ChatEncoder) -> bool:
    """Tell whether the prompt shows what a tool answered."""
    called = {"role": "assistant", "content": "", "tool_calls": [_call(0)]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _call(0)["id"]}
    try:
        return _RESULT in chat.text([_QUESTION, called, result], [_TOOL.described])
    except (TemplateError, TypeError, ValueError):
        return False


def _render(chat: ChatEncoder, **fields: Any) -> str:
    """Return what the template writes for an answer of these fields; empty: it takes none."""
    answer: dict[str, Any] = {"role": "assistant", "content": "", **fields}
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
