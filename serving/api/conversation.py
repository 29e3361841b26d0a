"""Messages, and the tools that they may call, as requests write them."""

from typing import Annotated, Literal

from msgspec import Meta, Raw, Struct

MAX_PARTS = 256
MAX_TOOLS = 128

ToolName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}\\Z")]


class TextPart(Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    text: str


class CalledFunction(Struct, frozen=True, forbid_unknown_fields=True):
    name: ToolName
    arguments: str  # JSON


class CallField(Struct, frozen=True, forbid_unknown_fields=True, tag="function"):
    """A call in an answer that is sent back as history."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    function: CalledFunction


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: Annotated[str, Meta(pattern="^(system|developer|user|assistant|tool)$")]
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_PARTS)] | None = None
    tool_calls: Annotated[list[CallField], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    # Clients send answers back as history, with every field that an answer may have.
    refusal: None = None
    audio: None = None
    function_call: None = None

    def __post_init__(self) -> None:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"`tool_calls` are of the assistant, not of {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError(
                "`tool_call_id` belongs to messages of the role `tool`, and to no other"
            )
        if self.content is None and self.tool_calls is None:
            raise ValueError("`content` is missing")

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Function(Struct, frozen=True, forbid_unknown_fields=True):
    name: ToolName
    description: Annotated[str, Meta(max_length=16_384)] = ""
    parameters: Raw = Raw(b"null")  # a JSON schema of an object; null: no parameters
    strict: bool | None = None


class ToolField(Struct, frozen=True, forbid_unknown_fields=True, tag="function"):
    function: Function


class FunctionName(Struct, frozen=True, forbid_unknown_fields=True):
    name: ToolName


class NamedTool(Struct, frozen=True, forbid_unknown_fields=True, tag="function"):
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool
