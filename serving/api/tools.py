"""What a chat request says of tools: the ones on offer, whether one must be called, and history."""

from dataclasses import dataclass

from serving.api.conversation import CallField, NamedTool, ToolField
from serving.api.output import TextFormat, json_object
from serving.api.request_error import RequestError
from serving.api.schemas import ChatRequest
from serving.calls import CallFormat, CallParser
from serving.engine.boundary import Grammar, GrammarRefused
from serving.tokens import Tokens, ToolCall
from serving.tools import Tool, call_grammar


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request, in the format of its base."""

    form: CallFormat
    tools: tuple[Tool, ...]
    grammar: Grammar | None  # None: the model decides what it writes

    def parser(self) -> CallParser:
        return CallParser(self.form, {tool.name: tool.parameters for tool in self.tools})


def toolbox_of(fields: ChatRequest, tokens: Tokens) -> Toolbox | None:
    """Return the tools that this answer may call; None when it may call none.

    Raises RequestError for a choice that is none, and for a base that knows no tools.
    """
    history = any(m.tool_calls is not None or m.role == "tool" for m in fields.messages)
    template = tokens.tool_template if fields.tools or history else None
    if template is None and (fields.tools or history):
        raise RequestError(
            "This base model's chat template has no tools, or writes their calls in a form that "
            "is not read here. Use a base model whose template has them, or leave tools out.",
            param="tools" if fields.tools else "messages",
            code="tools_unsupported",
        )
    chosen = _chosen(fields)
    if template is None or not chosen or fields.tool_choice == "none":
        return None
    if not isinstance(fields.response_format, TextFormat):
        raise RequestError(
            "`response_format` and tools contradict each other: an answer is either a call or of "
            'that format. Send one of them, or `tool_choice: "none"`.',
            param="response_format",
        )
    must = fields.tool_choice != "auto"
    many = fields.parallel_tool_calls and not isinstance(fields.tool_choice, NamedTool)
    try:
        grammar = call_grammar(
            template.form,
            chosen,
            must=must,
            many=many and (template.several or not must),
            special_id=tokens.special_id,
        )
    except GrammarRefused as error:
        raise RequestError(str(error), param="tools", code="grammar_refused") from error
    return Toolbox(template.form, chosen, grammar)


def _chosen(fields: ChatRequest) -> tuple[Tool, ...]:
    """Return the tools that may be called; of a named choice that one."""
    tools = tuple(_tool(field, f"tools[{index}]") for index, field in enumerate(fields.tools))
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"`tools`: there are two of the name {twice!r}.", param="tools")
    choice = fields.tool_choice
    if isinstance(choice, NamedTool):
        tools = tuple(tool for tool in tools if tool.name == choice.function.name)
    if not tools and choice not in ("none", "auto"):
        raise RequestError(
            "`tool_choice` asks for a call of a tool that is not among `tools`.",
            param="tool_choice",
        )
    return tools


def _tool(field: ToolField, where: str) -> Tool:
    function = field.function
    given = bytes(function.parameters)
    parameters = (
        {"type": "object", "properties": {}, "additionalProperties": False}
        if given == b"null"
        else json_object(given, f"`{where}.function.parameters`", "tools")
    )
    if parameters.get("type", "object") != "object":
        raise RequestError(
            f"`{where}.function.parameters` describes a {parameters['type']!r}; the arguments of a "
            "tool are an object.",
            param="tools",
        )
    return Tool(function.name, parameters, function.description, bool(function.strict))


def call_of(field: CallField) -> ToolCall:
    """Return a call of the history. Raises RequestError when its arguments are no JSON object."""
    function = field.function
    what = f"`messages`: the arguments of {function.name!r}"
    arguments = json_object(function.arguments.encode() or b"{}", what, "messages")
    return ToolCall(field.id, function.name, arguments)
