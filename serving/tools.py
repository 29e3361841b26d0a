"""Tools that a request offers, and the grammar of their calls in a base's own format."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serving.call_tags import FUNCTION
from serving.calls import CallFormat
from serving.engine.boundary import Grammar, GrammarRefused
from serving.engine.grammar import JSON_SPACE, MAX_SOURCE_CHARACTERS
from serving.python_grammar import PYTHON_RULES, python_rules
from serving.tagged_grammar import TAGGED_RULES, tagged_rules

ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may ask for."""

    name: str
    parameters: dict[str, Any]  # a JSON schema of an object
    description: str = ""
    strict: bool = False  # arguments follow `parameters` whenever it is called

    @property
    def described(self) -> dict[str, Any]:
        """What the chat template shows to the model."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    *,
    must: bool,
    many: bool,
    special_id: Callable[[str], int | None],
) -> Grammar | None:
    """Return the grammar of an output that calls these tools; None where everything is allowed.

    `must`: there is a call, and nothing else. `many`: there may be several. `special_id` gives
    the id of a text that is a control token of the base. Raises GrammarRefused for schemas that
    are too large, or that the format cannot be held to.
    """
    if not must and many and not any(tool.strict for tool in tools):
        return None
    rules, length = [*_rules(form, tools, must, many, special_id)], 0
    for rule in _calls(form, tools, must):
        rules.append(rule)
        length += len(rule)
        if length > MAX_SOURCE_CHARACTERS:
            raise GrammarRefused(
                f"The grammar of these tools has more than {MAX_SOURCE_CHARACTERS} characters."
            )
    return Grammar("lark", "\n".join(rules))


def _rules(
    form: CallFormat,
    tools: Sequence[Tool],
    must: bool,
    many: bool,
    special_id: Callable[[str], int | None],
) -> Iterator[str]:
    def symbol(text: str) -> str:
        token_id = special_id(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"

    opening = symbol(form.opening)
    if form.bare:
        calls = 'object ("; " object)*' if many else "object"
        yield f"start: {calls}" if must else f"start: {calls} | OTHER?"
        yield r"OTHER: /[ \t\r\n]*[^{ \t\r\n](.|\n)*/"
        return
    gap = "" if form.marks else '"\\n"'  # between a call and the next
    together = form.listed or form.python  # all calls behind one opening
    if form.python:
        calls = f"object ({gap} object)*" if many else "object"
        yield f"body: {calls} {symbol(form.closing)}"
    elif form.listed:
        objects = 'object ("," GAP? object)*' if many else "object"
        closing = symbol(form.closing) if form.closing else ""
        yield f'body: GAP? "[" GAP? {objects} GAP? "]" {closing}'
        yield r"GAP: /[ \n]{1,8}/"
    elif form.marks:
        call_id, arguments = map(symbol, form.marks)
        yield "body: object"
        yield f"between: ({call_id} CALL_ID)? {arguments}"
        yield "CALL_ID: /[a-zA-Z0-9]{9}/"
    else:
        yield f'body: "\\n" object "\\n" {symbol(form.closing)}'
    repeated = many and not together
    if must:
        yield f"start: {opening} body" + (f" ({gap} {opening} body)*" if repeated else "")
        return
    yield "start: (head body)* text" if repeated else "start: text | head body"
    lazy = "[lazy]" if special_id(form.opening) is None else ""
    yield f"head{lazy}: TEXT {opening}"
    yield "text: TEXT"
    # A tagged call counts without its opening, too, and is no text.
    names = "|".join(tool.name for tool in tools)
    bare = rf" & ~/(.|\n)*{FUNCTION}({names})>(.|\n)*/" if form.tagged else ""
    yield rf"TEXT: /(.|\n)*/{bare}"


def _calls(form: CallFormat, tools: Sequence[Tool], must: bool) -> Iterator[str]:
    yield "object: " + " | ".join(f"tool_{number}" for number in range(len(tools)))
    if form.numbered:
        yield "NUMBER: /[0-9]{1,4}/"
    if form.tagged:
        yield from TAGGED_RULES
    elif form.python:
        yield from PYTHON_RULES
    for number, tool in enumerate(tools):
        rule, schema = f"tool_{number}", tool.parameters if must or tool.strict else ANY_OBJECT
        if form.tagged:
            yield from tagged_rules(rule, tool.name, schema, form.padding)
            continue
        if form.python:
            yield from python_rules(rule, tool.name, schema)
            continue
        before, after = _around(form, json.dumps(tool.name))
        yield f"{rule}: {before} arguments_{number} {after}"
        held = {"x-guidance": {"whitespace_pattern": JSON_SPACE}, **ANY_OBJECT, **schema}
        yield f"arguments_{number}: %json {json.dumps(held)}"


def _around(form: CallFormat, name: str) -> tuple[str, str]:
    """Return what stands before and after the arguments of a call; `name` is in quotes."""
    if form.marks:
        return f"{name} between", ""
    head = f'"{form.tool}": {name}, "{form.arguments}": '
    if form.numbered:
        begin, then = json.dumps(f'{{"{form.numbered}": "'), json.dumps(f'", {head}')
        return f"{begin} NUMBER {then}", '"}"'
    return json.dumps(f"{{{head}"), '"}"'
