"""The fields of inference requests, their bounds, and what happens to every other field.

Each field is decoded on its own, so that an error names its field. `null` means not given.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from serving.api.conversation import MAX_TOOLS, Message, ToolChoice, ToolField
from serving.api.output import ResponseFormat, TextFormat
from serving.api.request_error import RequestError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_TOKENS = 1_000_000
MAX_MESSAGES = 1024
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 300

StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)]
Count = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0, le=2**31)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_TOKENS)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


class SamplingFields(Struct, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    model: Annotated[str, Meta(min_length=1, max_length=300)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=16)] = 1
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops = ()  # type: ignore[assignment]  # an empty tuple is the immutable empty list
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] = 0  # -1 and 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    ignore_eos: bool = False
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] = {}
    response_format: ResponseFormat = TextFormat()
    # Who the answer is for: the unit of an experiment.
    user: Annotated[str, Meta(max_length=512)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=512)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None  # accepted, has no effect yet

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: Annotated[list[ToolField], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "`top_logprobs` is only for requests with `logprobs: true`.", param="top_logprobs"
            )
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise RequestError(
                "`max_tokens` and `max_completion_tokens` are two names of one bound. Send one.",
                param="max_tokens",
            )

    @property
    def top(self) -> int | None:
        """How many alternatives to ask the engine for; None for no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    prompt: (
        str | Annotated[list[str | TokenId | TokenIds], Meta(min_length=1, max_length=MAX_TOKENS)]
    )
    logprobs: TopLogprobs | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [self.prompt]  # type: ignore[list-item]  # just checked
        if any(isinstance(item, int) for item in self.prompt):
            raise RequestError(
                "`prompt`: a list is either all token ids, or all prompts.", param="prompt"
            )
        return self.prompt  # type: ignore[return-value]  # just checked


# Fields of the OpenAI API that are taken only with a value that changes nothing here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

T = TypeVar("T", bound=SamplingFields)
# Who sends the one does not leave out the other: a second name of it, or what it contradicts.
INSTEAD = {"max_tokens": "max_completion_tokens", "response_format": "tools"}
DefaultsOf = Callable[[str], Mapping[str, Any]]  # model → field → value


@dataclass(frozen=True, slots=True)
class RequestDecoder(Generic[T]):
    """Decodes a body into one struct."""

    struct: type[T]
    fields: dict[str, msgspec.json.Decoder[Any]]
    required: frozenset[str]

    @classmethod
    def of(cls, struct: type[T]) -> "RequestDecoder[T]":
        fields = msgspec.structs.fields(struct)
        decoders = {field.encode_name: msgspec.json.Decoder(field.type) for field in fields}
        return cls(struct, decoders, frozenset(f.encode_name for f in fields if f.required))

    def decode(self, body: bytes, defaults_of: DefaultsOf = lambda _: {}) -> T:
        """Return the checked request. Raises RequestError with the field it is about.

        `defaults_of` tells what the model that is asked for fills in where a field is left out.
        """
        raw = _decode(_OBJECT, body, None)
        given = {name: value for name, value in raw.items() if bytes(value) != b"null"}
        self._fill(given, defaults_of)
        for name in given.keys() - self.fields.keys():
            _check_neutral(name, given[name])
        for name in sorted(self.required - given.keys()):
            raise RequestError(f"`{name}` is missing.", param=name, code="missing_field")
        values = {
            name: _decode(self.fields[name], value, name)
            for name, value in given.items()
            if name in self.fields
        }
        return self.struct(**values)

    def decode_field(self, name: str, value: Any) -> Any:
        """Return one field as a request would have it. Raises RequestError."""
        if value is None:
            raise RequestError(f"`{name}` is null: leave it out.", param=name, code="invalid_value")
        return _decode(self.fields[name], Raw(msgspec.json.encode(value)), name)

    def _fill(self, given: dict[str, Raw], defaults_of: DefaultsOf) -> None:
        if "model" not in given:
            return
        model = _decode(self.fields["model"], given["model"], "model")
        for name, value in defaults_of(model).items():
            if name in self.fields and not {name, INSTEAD.get(name)} & given.keys():
                given[name] = Raw(msgspec.json.encode(value))


_OBJECT = msgspec.json.Decoder(dict[str, Raw])
_ANY = msgspec.json.Decoder(Any)
_NUMBER = re.compile(rb"[-+.0-9eE]{1,30}")  # texts are not repeated: they may be what is private


def _decode(decoder: "msgspec.json.Decoder[Any]", data: bytes | Raw, name: str | None) -> Any:
    where = f"`{name}`: " if name else "The body is not a JSON object: "
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        sent = f" (sent: {bytes(data).decode()})" if name and _NUMBER.fullmatch(bytes(data)) else ""
        raise RequestError(f"{where}{error}{sent}", param=name, code="invalid_value") from error
    except msgspec.DecodeError as error:
        raise RequestError(f"{where}{error}", param=name, code="invalid_json") from error
    except UnicodeError as error:
        raise RequestError(
            f"{where}it has bytes that are not UTF-8.", param=name, code="invalid_json"
        ) from error
    except RecursionError as error:
        raise RequestError(
            f"{where}it is nested too deeply.", param=name, code="invalid_json"
        ) from error


def _check_neutral(name: str, value: Raw) -> None:
    if name not in NEUTRAL:
        raise RequestError(
            f"There is no field {name[:100]!r} in this request. Remove it.",
            param=name[:100],
            code="unknown_parameter",
        )
    if _decode(_ANY, value, name) not in NEUTRAL[name]:
        allowed = " or ".join(msgspec.json.encode(v).decode() for v in NEUTRAL[name])
        raise RequestError(
            f"`{name}` is not supported here. Leave it out{f' or send {allowed}' * bool(allowed)}.",
            param=name,
            code="unsupported_parameter",
        )
