"""What an endpoint fills in where a request leaves it out: fields of the request, checked alike."""

from collections.abc import Mapping
from typing import Any

import msgspec

from serving.api.output import grammar_of
from serving.api.request_error import RequestError
from serving.api.schemas import ChatRequest, RequestDecoder
from serving.routing import SYSTEM_PROMPT

DEFAULTS = (
    SYSTEM_PROMPT,
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "response_format",
)
MAX_BYTES = 64 * 1024  # of all of them together, as JSON

_DECODER = RequestDecoder.of(ChatRequest)


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Raises RequestError for what no request may ask, with the field it is about."""
    for name, value in defaults.items():
        if name not in DEFAULTS:
            raise RequestError(
                f"{name[:100]!r} cannot be a default of an endpoint. It may have: "
                f"{', '.join(DEFAULTS)}.",
                param=name[:100],
            )
        if name == SYSTEM_PROMPT:
            _check_system_prompt(value)
        else:
            decoded = _DECODER.decode_field(name, value)
            if name == "response_format":
                grammar_of(decoded)
    size = len(msgspec.json.encode(defaults))
    if size > MAX_BYTES:
        raise RequestError(f"The defaults are {size} bytes of JSON; they may be {MAX_BYTES}.")


def _check_system_prompt(value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"`{SYSTEM_PROMPT}` is a text that is not empty.", param=SYSTEM_PROMPT)
