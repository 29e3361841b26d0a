"""Formats, biases and log probabilities over HTTP, from the real engine, with the stock client."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from serving.engine.engine import TorchEngine
from serving.engine.grammar import MAX_SOURCE_CHARACTERS
from serving.engine.settings import EngineSettings
from serving.tokens import Tokens
from tests import tiny
from tests.serving.engine.driving import Folders, Oracle, base_of
from tests.serving.live import CHAT, Running, opened, running

COMPLETION: dict[str, Any] = {"model": "base", "prompt": "say"}


class Light(pydantic.BaseModel):
    room: Literal["kitchen", "hall"]
    level: int = pydantic.Field(ge=0, le=100)
    names: list[Literal["a", "b"]] = pydantic.Field(max_length=3)


@pytest.fixture(scope="module")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("random") / "base", seed=11)


@pytest.fixture(scope="module")
def real(
    tokens: Tokens, random_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server whose engine computes: a base of random weights."""
    settings = EngineSettings(device="cpu", dtype="float32", max_running=16, max_model_len=400)
    engine = TorchEngine.create(base_of(random_base), Folders({}), settings)
    with (
        opened(tmp_path_factory.mktemp("output")) as wardrobe,
        running(wardrobe, tokens, engine) as server,  # type: ignore[arg-type]  # an engine, too
    ):
        yield server


def test_the_client_s_own_parser_gets_its_model_in_every_choice(real: Running) -> None:
    answer = real.openai().chat.completions.parse(
        **CHAT, response_format=Light, max_tokens=300, n=4, seed=2
    )
    found = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(light, Light) for light in found)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert len({repr(light) for light in found}) > 1, "choices have seeds of their own"


def test_a_stream_of_an_object_is_the_whole_answer_in_pieces(real: Running) -> None:
    asked = {**CHAT, "seed": 5, "max_tokens": 300, "logprobs": True, "top_logprobs": 2}
    wanted = Light.model_json_schema() | {"additionalProperties": False}
    asked["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": "light", "schema": wanted, "strict": True},
    }
    whole = real.openai().chat.completions.create(**asked).choices[0]
    chunks = list(real.openai().chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.message.content == text
    Light.model_validate_json(text)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "stop"
    assert whole.logprobs is not None
    streamed = [t for c in chunks if (p := c.choices[0].logprobs) for t in p.content or []]
    assert streamed == whole.logprobs.content
    assert bytes(b for token in streamed for b in token.bytes or []).decode() == text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_any_object_and_an_expression_can_be_asked_for_everywhere(real: Running, path: str) -> None:
    ask = CHAT if "chat" in path else COMPLETION

    def texts(response_format: Any, **more: Any) -> list[str]:
        body = ask | {"response_format": response_format, "n": 4, "seed": 1} | more
        answer = real.post(body, path)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        ended = [c for c in choices if c["finish_reason"] == "stop"]
        return [c["message"]["content"] if "chat" in path else c["text"] for c in ended]

    bias = {"34": 6, "125": 12}  # quotes and closing braces, so that some objects end
    objects = texts({"type": "json_object"}, max_tokens=200, logit_bias=bias)
    assert objects
    assert all(isinstance(json.loads(text), dict) for text in objects)
    found = texts({"type": "regex", "value": "(yes|no), [a-f]{3}"}, max_tokens=20)
    assert len(found) == 4
    assert all(re.fullmatch("(yes|no), [a-f]{3}", text) for text in found)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "object", "not": {}}, '"not"'),
        ({"enum": ["x" * MAX_SOURCE_CHARACTERS]}, "characters"),
        ([1], "not an object"),
        (7, "not an object"),
        ({"multipleOf": 999999937, "allOf": [{"multipleOf": 999999893}], "type": "integer"}, ""),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_is_a_400_that_says_why(
    real: Running, schema: Any, reason: str, stream: bool
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = real.post(CHAT | {"response_format": wanted, "stream": stream, "n": 2})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "response_format"
    assert reason in error["message"]
    assert real.post(CHAT | {"max_tokens": 2}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "yaml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "no schema"}}),
        ("response_format", {"type": "json_object", "schema": {}}),
        ("response_format", {"type": "regex", "value": ""}),
        ("response_format", "json"),
        ("logit_bias", {"1": 100.1}),
        ("logit_bias", {"1": -101}),
        ("logit_bias", {"258": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"one": 1}),
        ("logit_bias", {str(token): 1 for token in range(301)}),
        ("logit_bias", [1]),
    ],
)
def test_what_is_out_of_bounds_names_its_field(real: Running, field: str, value: Any) -> None:
    answer = real.post(CHAT | {field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_a_bias_changes_the_answer_and_not_the_log_probabilities(
    real: Running, random_base: Path
) -> None:
    asked: dict[str, Any] = COMPLETION | {"max_tokens": 6, "temperature": 0, "logprobs": 4}
    plain = real.openai().completions.create(**asked).choices[0]
    biased = real.openai().completions.create(**asked, logit_bias={"113": 100}).choices[0]
    assert plain.text != biased.text == "qqqqqq"
    oracle = Oracle(random_base)
    for choice in (plain, biased):
        said = choice.logprobs
        assert said is not None
        assert said.token_logprobs is not None
        assert said.top_logprobs is not None
        assert said.tokens is not None
        ids = [*b"say", *_bytes(said.tokens)]
        table = oracle.logprobs(ids)[2:-1]
        for row, token, own, top in zip(
            table, ids[3:], said.token_logprobs, said.top_logprobs, strict=True
        ):
            assert own == pytest.approx(float(row[token]), abs=1e-4)
            assert sorted(top.values())[-4:] == pytest.approx(
                row.topk(4).values.flip(0).tolist(), abs=1e-4
            )
            # The sampled token is always named, one more where it is not among the most likely.
            assert len(top) == 4 + (token not in row.topk(4).indices.tolist())
            assert own in top.values()


def _bytes(names: list[str]) -> list[int]:
    return [int(n[-2:], 16) if n.startswith("bytes:") else ord(n) for n in names]


def test_stop_strings_penalties_min_tokens_and_formats_work_together(real: Running) -> None:
    wanted = {"type": "regex", "value": "(ab){3,40}"}
    asked = CHAT | {"response_format": wanted, "max_tokens": 60, "seed": 3}

    def choice(**more: Any) -> Any:
        return real.post(asked | more).json()["choices"][0]

    stopped = choice(stop=["aba"])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("", "stop")
    later = choice(stop=["aba"], min_tokens=8)
    assert later["message"]["content"].startswith("ab" * 4)
    assert later["finish_reason"] == "stop"
    shaped = choice(
        presence_penalty=2, frequency_penalty=2, repetition_penalty=2, top_k=3, top_p=0.9
    )
    assert re.fullmatch("(ab)+", shaped["message"]["content"])
    whole = choice(min_tokens=60)
    assert (whole["message"]["content"], whole["finish_reason"]) == ("ab" * 30, "length")


def test_a_schema_the_library_cannot_follow_is_the_client_s_bad_request(real: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        real.openai().chat.completions.create(
            **CHAT, extra_body={"response_format": {"type": "regex", "value": "a(?=b)"}}
        )
    assert refused.value.code == "grammar_refused"
    assert refused.value.param == "response_format"
