"""Tools over HTTP with the stock client: offered to the template, called, streamed, answered."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tokenizers import Tokenizer

from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings
from serving.tokens import Tokens
from tests import tiny
from tests.serving.chat_templates import chat_template
from tests.serving.engine.driving import Folders, base_of
from tests.serving.live import CHAT, Running, Wardrobe, opened, running
from tests.serving.scripted import ScriptedEngine, says

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell it.", "parameters": PARAMETERS},
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
SCHEMAS = {"weather": PARAMETERS, "clock": {"type": "object", "maxProperties": 0}}
SPOKEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "mistral_args": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}',
    "llama": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "smollm3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "granite": '<|tool_call|>[{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "cohere": (
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", '
        '"parameters": {"city": "Oslo"}}\n]<|END_ACTION|>'
    ),
    "tags": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
        "</tool_call>"
    ),
    "seed": (
        "<seed:tool_call>\n<function=weather>\n<parameter=city>Oslo</parameter>\n</function>\n"
        "</seed:tool_call>"
    ),
    "olmo": '<function_calls>weather(city="Oslo")</function_calls>',
}
TEMPLATES = {"hermes": "qwen2_5", "llama": "llama3_2", "tags": "qwen3_5_nothink"}
# The others have the family's name.


@pytest.fixture(scope="module", params=sorted(SPOKEN))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tool_base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny.make_base(tmp_path_factory.mktemp(family) / "base", seed=2)
    (base / "chat_template.jinja").write_text(chat_template(TEMPLATES.get(family, family)))
    return base


@pytest.fixture(scope="module")
def tool_tokens(tool_base: Path) -> Iterator[Tokens]:
    tokens = Tokens(tool_base)
    yield tokens
    tokens.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wardrobe]:
    with opened(tmp_path_factory.mktemp("tools")) as wardrobe:
        yield wardrobe


@pytest.fixture(scope="module")
def real(store: Wardrobe, tool_base: Path, tool_tokens: Tokens) -> Iterator[Running]:
    """A base of random weights, and the family's template."""
    settings = EngineSettings(device="cpu", dtype="float32", max_running=16)
    wide = tiny.make_base(tool_base.with_name("wide"), seed=2, max_position_embeddings=4096)
    engine = TorchEngine.create(base_of(wide), Folders({}), settings)
    with running(store, tool_tokens, engine) as server:  # type: ignore[arg-type]  # an engine, too
        yield server


def speaking(text: str) -> ScriptedEngine:
    return ScriptedEngine(says(text), max_model_len=8192)


def streamed(live: Running, **fields: Any) -> tuple[str | None, list[dict[str, Any]], str | None]:
    """Put a stream together as clients do: content, calls, and the reason."""
    content, calls, reason = None, [], None
    for chunk in live.openai().chat.completions.create(**fields, stream=True):
        [choice] = chunk.choices
        if choice.delta.content is not None:
            content = (content or "") + choice.delta.content
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.function.name:
                assert (call.type, call.index) == ("function", len(calls))
                calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return content, calls, reason


def test_a_call_comes_out_as_one_whole_and_streamed(
    wardrobe: Wardrobe, tool_tokens: Tokens, family: str
) -> None:
    with running(wardrobe, tool_tokens, speaking(SPOKEN[family])) as live:
        asked: dict[str, Any] = {**CHAT, "tools": [WEATHER, CLOCK]}
        choice = live.openai().chat.completions.create(**asked).choices[0]
        content, calls, reason = streamed(live, **asked)
    assert choice.finish_reason == reason == "tool_calls"
    assert choice.message.content is None
    assert content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}')
    assert len(call.id) == 9
    assert [(c["name"], c["arguments"]) for c in calls] == [("weather", '{"city": "Oslo"}')]
    assert calls[0]["id"] not in (None, call.id)


def test_the_template_is_shown_the_tools_and_the_history_of_calls(
    wardrobe: Wardrobe, tool_tokens: Tokens, family: str
) -> None:
    prompts: list[str] = []

    class Listening(ScriptedEngine):
        def _admit(self, request: Any) -> None:
            prompts.append(tool_tokens.decode(request.prompt_ids))
            super()._admit(request)

    engine = Listening(says(SPOKEN[family]), max_model_len=8192)
    with running(wardrobe, tool_tokens, engine) as live:
        client = live.openai()
        tools: Any = [WEATHER]
        said = client.chat.completions.create(**CHAT, tools=tools).choices[0].message
        assert said.tool_calls
        result = {
            "role": "tool",
            "tool_call_id": said.tool_calls[0].id,
            "content": "rain <|im_end|>",
        }
        history: Any = [*CHAT["messages"], said, result]
        client.chat.completions.create(model="base", messages=history, tools=tools)
        client.chat.completions.create(
            model="base", messages=history, tools=tools, tool_choice="none"
        )
    first, second, without = prompts
    assert "Tell it." in first
    assert SPOKEN[family].strip("]}") in second.split("Tell it.")[1]
    assert "rain <|im_end|>" in second, "what looks like a control token is plain text"
    assert "Tell it." not in without, "`none`: the model is shown no tools"


def test_marks_of_calls_that_are_control_tokens_are_seen(
    wardrobe: Wardrobe, tmp_path: Path
) -> None:
    base = tiny.make_base(tmp_path / "base", seed=2)
    (base / "chat_template.jinja").write_text(chat_template("mistral_call_id"))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"])  # type: ignore[arg-type]  # it takes strings, too
    tokenizer.save(str(base / "tokenizer.json"))
    said = 'so[TOOL_CALLS]weather[CALL_ID]abc12EFGH[ARGS]{"city": "Oslo"}[TOOL_CALLS]clock[ARGS]{}'
    ids = [*tokenizer.encode(said).ids, tiny.EOS_ID]
    tokens = Tokens(base)
    with running(wardrobe, tokens, ScriptedEngine(lambda _: iter(ids), max_model_len=8192)) as live:
        content, calls, reason = streamed(live, **CHAT, tools=[WEATHER, CLOCK])
    tokens.close()
    assert (content, reason) == ("so", "tool_calls")
    found = [(call["name"], call["arguments"]) for call in calls]
    assert found == [("weather", '{"city": "Oslo"}'), ("clock", "{}")]


def test_text_that_calls_nothing_is_content(
    wardrobe: Wardrobe, tool_tokens: Tokens, family: str
) -> None:
    with running(wardrobe, tool_tokens, speaking("No <tool, [TOOL] or {name}.\n")) as live:
        asked: dict[str, Any] = {**CHAT, "tools": [WEATHER], "logprobs": True}
        choice = live.openai().chat.completions.create(**asked).choices[0]
        content, calls, reason = streamed(live, **asked)
    assert choice.message.content == content == "No <tool, [TOOL] or {name}.\n"
    assert choice.message.tool_calls is None
    assert (calls, choice.finish_reason, reason) == ([], "stop", "stop")


def test_log_probabilities_of_a_call_are_not_lost_in_a_stream(
    wardrobe: Wardrobe, tool_tokens: Tokens, family: str
) -> None:
    with running(wardrobe, tool_tokens, speaking(SPOKEN[family])) as live:
        asked: dict[str, Any] = {**CHAT, "tools": [WEATHER], "logprobs": True}
        choice = live.openai().chat.completions.create(**asked).choices[0]
        chunks = list(live.openai().chat.completions.create(**asked, stream=True))
    assert choice.logprobs is not None
    parts = [t for c in chunks if (p := c.choices[0].logprobs) for t in p.content or []]
    assert parts == choice.logprobs.content
    assert "".join(token.token for token in parts) == SPOKEN[family]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_call_that_must_be_follows_its_tool_s_schema_from_random_weights(
    real: Running, choice: Any, names: set[str]
) -> None:
    asked: dict[str, Any] = {
        **CHAT, "tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 200, "n": 8,
    }  # fmt: skip
    called: set[str] = set()
    for heat in (0.5, 1.5) * 8:  # once around as a rule; all sixteen may be too long, by chance
        if heat == 0.5 and called:
            break
        answer = real.openai().chat.completions.create(**asked, temperature=heat)
        for each in answer.choices:
            if each.finish_reason == "length":
                continue
            assert each.finish_reason == "tool_calls"
            assert each.message.content is None
            for call in each.message.tool_calls or []:
                assert call.type == "function"
                called.add(call.function.name)
                arguments = json.loads(call.function.arguments)
                jsonschema.validate(arguments, SCHEMAS[call.function.name])
    assert called
    assert called <= names


def test_without_parallel_calls_there_is_one(real: Running) -> None:
    asked: dict[str, Any] = {
        **CHAT, "tools": [CLOCK], "tool_choice": "required", "max_tokens": 150, "n": 8,
        "parallel_tool_calls": False,
    }  # fmt: skip
    ended = [
        choice
        for choice in real.openai().chat.completions.create(**asked).choices
        if choice.finish_reason == "tool_calls"
    ]
    assert ended
    assert all(len(choice.message.tool_calls or []) == 1 for choice in ended)


def test_a_strict_tool_that_the_model_chooses_gets_its_schema(real: Running, family: str) -> None:
    """The model is pushed into a call by the bias of what begins one."""
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    opening = SPOKEN[family][:1]
    asked: dict[str, Any] = {
        **CHAT, "tools": [strict], "max_tokens": 120, "n": 4, "seed": 3,
        "logit_bias": {str(ord(opening)): 8},
    }  # fmt: skip
    for choice in real.openai().chat.completions.create(**asked).choices:
        for call in choice.message.tool_calls or []:
            assert call.type == "function"
            if choice.finish_reason != "length":
                jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)


def test_a_base_whose_template_has_no_tools_says_so(live: Running) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    bodies: list[dict[str, Any]] = [
        {"tools": [CLOCK]},
        {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]},
        {"messages": [*CHAT["messages"], {"role": "tool", "content": "x", "tool_call_id": "x"}]},
    ]
    for body in bodies:
        with pytest.raises(openai.BadRequestError) as refused:
            live.openai().chat.completions.create(**{**CHAT, **body})
        assert refused.value.code == "tools_unsupported"
        assert "template" in str(refused.value)


@pytest.mark.parametrize("family", ["hermes"], indirect=True)  # no template decides these
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no blanks"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "line\n"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": 3}}]}, "tools"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "x", "parameters": {"type": "null"}}}
                ]
            },
            "tools",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "x", "parameters": {"x-guidance": 1}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, "response_format"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "x", "parameters": {"not": {}}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {
                "tools": [CLOCK],
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "abcdefghi",
                                "type": "function",
                                "function": {"name": "clock", "arguments": "{"},
                            }
                        ],
                    }
                ],
            },
            "messages",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant"}]}, "messages"),
    ],
)
def test_what_cannot_be_asked_of_tools_names_its_field(
    real: Running, fields: dict[str, Any], param: str
) -> None:
    answer = real.post(CHAT | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
