"""What an answer consists of: chunks, usage, finish reasons, log probabilities beside the text."""

import itertools
import json
from typing import Any

import httpx
import pytest

from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine, says

SPOKEN = "héllo wörld, 日本語 🎉 and the end"
USAGE = {"stream_options": {"include_usage": True}}
COMPLETION = {"model": "base", "prompt": "hello"}


@pytest.fixture
def speaking(wardrobe: Wardrobe, tokens: Tokens) -> Any:
    with running(wardrobe, tokens, ScriptedEngine(says(SPOKEN, end=True))) as live:
        yield live


def chunks_of(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_chat_stream_has_the_chunks_of_the_openai_api_in_their_order(speaking: Running) -> None:
    chunks = chunks_of(speaking.post(CHAT | {"stream": True, "max_tokens": 3} | USAGE))
    first, *middle, finish, usage = chunks
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == SPOKEN[:2]
    empty = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert finish["choices"] == [empty]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_client_that_splits_text_into_lines_reads_whole_events(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    """Python knows ten ends of a line; an event stream has three of them."""
    said = "".join(f"a{end}" for end in "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r\n")
    with running(wardrobe, tokens, ScriptedEngine(says(said))) as live:
        lines = live.post(CHAT | {"stream": True}).text.splitlines()
        whole = live.post(CHAT).json()["choices"][0]["message"]["content"]
        completion = live.post(COMPLETION | {"stream": True}, "/v1/completions")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == said
    assert whole == said
    assert {line[:6] for line in completion.text.splitlines() if line} == {"data: "}


def test_an_answer_can_be_sent_back_as_history(speaking: Running) -> None:
    client = speaking.openai()
    said = client.chat.completions.create(**CHAT).choices[0].message
    history = [*CHAT["messages"], said, {"role": "user", "content": "and then?"}]
    again = client.chat.completions.create(model="base", messages=history)
    assert again.choices[0].message.content == SPOKEN


@pytest.mark.parametrize(
    ("stop", "shown", "cut"),
    [
        (None, SPOKEN, "."),  # a byte for the end token
        ("end", SPOKEN[:-3], "end"),
        ("日本", "héllo wörld, ", "日本"),
        (["nothing", "ö"], "héllo w", "ö"),
        ("lo w", "hél", "lo w"),
        ("end of it", SPOKEN, "."),
    ],
)
def test_log_probabilities_and_text_say_the_same_whatever_stops_the_answer(
    speaking: Running, stop: Any, shown: str, cut: str
) -> None:
    asked = CHAT | {"logprobs": True, "stop": stop}
    whole = speaking.post(asked).json()
    chunks = chunks_of(speaking.post(asked | {"stream": True} | USAGE))
    usage = chunks.pop()["usage"]
    choice = whole["choices"][0]
    streamed = [entry["choices"][0] for entry in chunks]
    parts = [(c["logprobs"] or {"content": []})["content"] for c in streamed]
    tokens = choice["logprobs"]["content"]

    assert choice["message"]["content"] == shown
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == shown
    assert "".join(c["delta"].get("content", "") for c in streamed) == shown
    assert list(itertools.chain(*parts)) == tokens
    assert choice["finish_reason"] == streamed[-1]["finish_reason"] == "stop"
    assert usage == whole["usage"]
    assert usage["completion_tokens"] == len((shown + cut).encode()), "what is cut was sampled"


def test_text_offsets_count_characters_of_the_answer(speaking: Running) -> None:
    body = COMPLETION | {"logprobs": 2, "max_tokens": 60}
    choice = speaking.post(body, "/v1/completions").json()["choices"][0]
    said = choice["logprobs"]
    starts = [index for index, char in enumerate(SPOKEN) for _ in char.encode()]
    assert said["text_offset"] == starts
    assert said["tokens"][:3] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert all(len(top) == 2 for top in said["top_logprobs"]), "no two alternatives share a name"
    chunks = chunks_of(speaking.post(body | {"stream": True}, "/v1/completions"))
    assert [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]] == starts


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_and_whole_answers_agree_over_the_cross_product(live: Running, path: str) -> None:
    """Choices × log probabilities × stop strings × seed × penalties × min_tokens."""
    ask = CHAT if "chat" in path else COMPLETION
    logprobs = {"logprobs": True, "top_logprobs": 3} if "chat" in path else {"logprobs": 3}
    variants = itertools.product(
        [{}, {"n": 3}],
        [{}, logprobs],
        [{}, {"stop": ["upp", "e b"]}, {"stop": "zz"}],
        [{}, {"seed": -5}],
        [{}, {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1.5}],
        [{}, {"min_tokens": 11, "ignore_eos": True}],
    )
    for parts in variants:
        body = ask | {"max_tokens": 12, "model": "acme/support"}
        for part in parts:
            body |= part
        whole = live.post(body, path).json()
        chunks = chunks_of(live.post(body | {"stream": True} | USAGE, path))
        assert chunks.pop()["usage"] == whole["usage"], body
        assert whole["usage"]["completion_tokens"] <= 12 * body.get("n", 1)
        for choice in whole["choices"]:
            mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
            reasons = [c["finish_reason"] for c in mine if c["finish_reason"]]
            assert reasons == [choice["finish_reason"]], body
            if "chat" in path:
                text = "".join(c["delta"].get("content", "") for c in mine)
                assert text == choice["message"]["content"], body
            else:
                assert "".join(c["text"] for c in mine) == choice["text"], body
            assert (choice["logprobs"] is not None) == ("logprobs" in body)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    live: Running, fields: dict[str, Any], param: str
) -> None:
    answer = live.post(CHAT | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_hopeless_raw_prompt_names_its_own_field(live: Running) -> None:
    answer = live.post(COMPLETION | {"prompt": "a" * 1_000_000}, "/v1/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
