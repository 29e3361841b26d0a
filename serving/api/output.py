"""What a request says of its output: the form it must have, and tokens that it likes or not."""

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Raw, Struct

from registry.errors import Refused
from registry.jsonfile import parse_object
from serving.api.request_error import RequestError
from serving.engine.boundary import Grammar


class TextFormat(Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """No format: free text."""


class JsonObjectFormat(Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"):
    """Any JSON object."""


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: Raw
    description: str | None = None
    strict: bool | None = None  # every answer follows the schema, asked for or not


class JsonSchemaFormat(Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    json_schema: JsonSchema


class RegexFormat(Struct, frozen=True, forbid_unknown_fields=True, tag="regex"):
    """As text-generation-inference has it; the OpenAI API has none."""

    value: Annotated[str, Meta(min_length=1)]


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat

ANY_OBJECT = Grammar("json", '{"type":"object"}')


def grammar_of(wanted: ResponseFormat) -> Grammar | None:
    """Return what the engine is to hold the output to; None for free text."""
    match wanted:
        case JsonObjectFormat():
            return ANY_OBJECT
        case JsonSchemaFormat():
            schema = bytes(wanted.json_schema.schema)
            json_object(schema, "`response_format.json_schema.schema`", "response_format")
            return Grammar("json", schema.decode())
        case RegexFormat():
            return Grammar("regex", wanted.value)
    return None


def json_object(data: bytes, what: str, param: str) -> dict[str, Any]:
    """Parse one JSON object of bounded depth. Raises RequestError."""
    try:
        return parse_object(data, what)
    except Refused as error:
        raise RequestError(str(error), param=param) from error


def check_bias(bias: Mapping[int, float], vocab: int) -> None:
    """Raise RequestError for a token that does not exist."""
    if strange := [token_id for token_id in bias if token_id >= vocab]:
        raise RequestError(
            f"`logit_bias`: token id {strange[0]} is not in the vocabulary, whose last id is "
            f"{vocab - 1}.",
            param="logit_bias",
        )
