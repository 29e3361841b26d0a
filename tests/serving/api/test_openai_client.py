"""The official client, unmodified, against a live server."""

import time

import openai
import pytest

from registry.errors import Conflict
from serving.api.errors import failure_of
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine, says


def wait_until(condition: object, seconds: float = 3.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_a_chat_is_answered_by_the_version_that_was_named(live: Running) -> None:
    raw = live.openai().chat.completions.with_raw_response.create(
        **{**CHAT, "model": "acme/support"}, max_tokens=16
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "acme/support@v1 "
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "acme/support@v1" == raw.headers["x-adapter"]
    assert raw.headers["x-adapter-digest"].startswith("sha256:")
    assert raw.headers["x-request-id"].startswith("req_")
    assert answer.system_fingerprint == f"fp_{raw.headers['x-adapter-digest'][7:23]}"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    prompt = b"<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert answer.usage.prompt_tokens == len(prompt) - len(b"<|im_start|>" * 2 + b"<|im_end|>") + 3


@pytest.mark.parametrize("model", ["base", "acme/tiny-base"])
def test_the_base_answers_under_its_id_and_as_base(live: Running, model: str) -> None:
    answer = live.openai().chat.completions.create(**{**CHAT, "model": model}, max_tokens=5)
    assert answer.choices[0].message.content == "base "
    assert answer.model == "acme/tiny-base"


@pytest.mark.parametrize("suffix", ["", "@production", "@v1"])
def test_every_selector_reaches_the_version(live: Running, suffix: str) -> None:
    chat = {**CHAT, "model": f"acme/support{suffix}"}
    assert live.openai().chat.completions.create(**chat, max_tokens=1).model == "acme/support@v1"


def test_a_digest_and_its_beginning_reach_the_version(live: Running) -> None:
    client = live.openai()
    digest = client.models.retrieve("acme/support").model_dump()["root"]
    for text in (digest, digest[:15]):
        chat = {**CHAT, "model": f"acme/support@{text}"}
        assert client.chat.completions.create(**chat, max_tokens=1).model == "acme/support@v1"


def test_a_beginning_that_fits_several_versions_is_not_a_status_that_clients_retry() -> None:
    failure = failure_of(Conflict("sha256:12345678 fits several versions"))
    assert (failure.status, failure.param) == (400, "model")


def test_a_stream_carries_the_same_text_as_the_whole_answer(live: Running) -> None:
    client = live.openai()
    chat = {**CHAT, "model": "acme/support", "max_tokens": 40, "n": 3, "seed": 4}
    whole = client.chat.completions.create(**chat)
    texts = ["", "", ""]
    roles: list[str | None] = []
    reasons: list[str | None] = []
    usage = None
    stream = client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        assert usage is None, "usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant"] * 3
    assert reasons == ["length"] * 3
    assert usage == whole.usage
    assert usage is not None
    assert usage.completion_tokens == 120


def test_choices_have_seeds_of_their_own(live: Running) -> None:
    chat = {**CHAT, "max_tokens": 8, "n": 8, "seed": 4}
    answer = live.openai().chat.completions.create(**chat)
    assert len({choice.message.content for choice in answer.choices}) > 1
    again = live.openai().chat.completions.create(**chat)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_a_stop_string_ends_the_answer_before_itself(live: Running) -> None:
    chat = {**CHAT, "model": "acme/support", "max_tokens": 100, "stop": ["port@", "zzz"]}
    answer = live.openai().chat.completions.create(**chat)
    assert answer.choices[0].message.content == "acme/sup"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("acme/support@")
    chunks = live.openai().chat.completions.create(**chat, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "acme/sup"


def test_the_model_may_end_by_itself(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens, ScriptedEngine(says("Grüße 👋"))) as live:
        chunks = list(live.openai().chat.completions.create(**CHAT, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Grüße 👋"
    assert not any("\ufffd" in (c.choices[0].delta.content or "") for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_logprobs_name_token_bytes_and_alternatives(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    with running(wardrobe, tokens, ScriptedEngine(says("é!", end=False))) as live:
        chat = {**CHAT, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        answer = live.openai().chat.completions.create(**chat)
        chunks = list(live.openai().chat.completions.create(**chat, stream=True))
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert bytes(b for token in content for b in token.bytes or []) == "é!".encode()
    assert content[2].token == "!"
    assert content[2].logprob == -0.5
    assert [top.token for top in content[2].top_logprobs] == ["!", '"']
    streamed = [t for c in chunks if (p := c.choices[0].logprobs) for t in p.content or []]
    assert streamed == content


def test_completion_logprobs_count_offsets_from_the_answer(live: Running) -> None:
    answer = live.openai().completions.create(model="base", prompt="x", max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["b", "a", "s", "e"]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"b": -0.5, "c": -1.5}


@pytest.mark.parametrize(
    ("prompt", "choices", "prompt_tokens"),
    [("abc", 1, 3), (["abc", "d"], 2, 4), ([97, 98], 1, 2), ([[97], [98, 99]], 2, 3)],
)
def test_completions_take_every_form_of_prompt(
    live: Running, prompt: str, choices: int, prompt_tokens: int
) -> None:
    answer = live.openai().completions.create(model="base", prompt=prompt)
    assert [choice.text for choice in answer.choices] == ["base base base b"] * choices
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt_tokens


def test_an_aborted_stream_frees_its_engine_request(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.01)
    with running(wardrobe, tokens, engine) as live:
        stream = live.openai().chat.completions.create(**CHAT, stream=True, max_tokens=400, n=2)
        next(stream)
        assert len(engine.running) == 2
        stream.close()
        wait_until(lambda: not engine.running, 1.0)
    assert engine.aborted == 2
    assert engine.generated < 200


def test_a_client_that_leaves_before_the_first_token_frees_its_engine_request(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=30)
    with running(wardrobe, tokens, engine) as live:
        for stream in (True, False):
            with pytest.raises(openai.APITimeoutError):
                live.openai(timeout=0.3).chat.completions.create(**CHAT, stream=stream)
            wait_until(lambda: not engine.running, 1.0)
    assert engine.aborted == 2


def test_each_error_is_the_class_that_clients_expect(live: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        live.openai(api_key="wrong").chat.completions.create(**CHAT)
    with pytest.raises(openai.NotFoundError) as missing:
        live.openai().chat.completions.create(**{**CHAT, "model": "acme/nobody"})
    assert missing.value.code == "adapter_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        live.openai().chat.completions.create(**CHAT, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        live.openai().chat.completions.create(**CHAT, prediction={"type": "content", "content": ""})
    assert unsupported.value.code == "unsupported_parameter"


def test_a_full_queue_is_a_rate_limit_with_retry_after(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.05, max_running=1, max_waiting=0)
    with running(wardrobe, tokens, engine) as live:
        stream = live.openai().chat.completions.create(**CHAT, stream=True, max_tokens=100)
        next(stream)
        for streamed in (False, True):
            with pytest.raises(openai.RateLimitError) as busy:
                live.openai().chat.completions.create(**CHAT, stream=streamed)
            assert busy.value.response.headers["retry-after"] == "3"
        stream.close()


def test_models_are_listed_with_digest_parent_and_publish_time(
    live: Running, wardrobe: Wardrobe
) -> None:
    base, adapter = live.openai().models.list().data
    assert (base.id, base.model_dump()["parent"]) == ("acme/tiny-base", None)
    assert adapter.id == "acme/support"
    assert adapter.owned_by == "acme"
    card = adapter.model_dump()
    assert (
        card["root"]
        == f"sha256:{wardrobe.registry.versions(wardrobe.registry.adapters()[0])[0].digest}"
    )
    assert card["parent"] == "acme/tiny-base"
    assert abs(adapter.created - time.time()) < 120
    assert live.openai().models.retrieve("acme/support@v1").model_dump()["root"] == card["root"]
