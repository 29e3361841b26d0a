"""The main job through the front door: real commands, real processes, a tiny base."""

import asyncio
import json
import time
from pathlib import Path

import httpx
import pytest

from registry.base import Bases
from tests.live import DEFAULT_BASE, LiveServer, Shop
from tests.tiny import make_adapter, make_base

CHAT = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """A store with two versions of one adapter, v1 in production."""
    folder = tmp_path_factory.mktemp("shop")
    base = make_base(folder / "made", max_position_embeddings=2048)
    for number in (1, 2):
        make_adapter(folder / f"v{number}", base, rank=8 * number, seed=number)
    Bases(folder / "cache" / "bases").add(DEFAULT_BASE, base, origin="made for a test")
    shop = Shop(folder / "home", folder / "cache")
    for number in (1, 2):
        shop.run("push", str(folder / f"v{number}"), "acme/support", "--base", DEFAULT_BASE)
    shop.run("promote", "acme/support@v1", "--reason", "first")
    return shop


def test_a_recipe_becomes_a_version_that_serves(shop: Shop) -> None:
    printed = shop.run("train", "adapters/icd-10", "--set", "train.steps=3", "--push")
    assert "clinic/icd-10" in printed
    [version] = shop.json("show", "clinic/icd-10")["versions"]
    assert version["number"] == 1
    assert version["card"]["metrics"]["adapter"]["total"] == 120
    refused = shop.run("promote", "clinic/icd-10@v1", "--reason", "three steps", status=2)
    assert "gate" in refused


async def stream_label(client: httpx.AsyncClient, begun: asyncio.Event) -> tuple[str, int, bool]:
    """Stream a long answer; return the version it ran on, its tokens, and whether it ended well."""
    body = CHAT | {"model": "acme/support", "max_tokens": 800, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    events, tokens, done = 0, 0, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                events += 1
                tokens = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", 0)
            done |= line == "data: [DONE]"
            if events > 10:
                begun.set()
        return answer.headers["x-adapter"], tokens, done


async def label_now(client: httpx.AsyncClient) -> str:
    answer = await client.post(
        "/v1/chat/completions", json=CHAT | {"model": "acme/support", "max_tokens": 1}
    )
    assert answer.status_code == 200, answer.text
    return answer.headers["x-adapter"]


async def seconds_until(client: httpx.AsyncClient, label: str) -> float:
    began = time.monotonic()
    while await label_now(client) != label:
        assert time.monotonic() - began < 10, f"{label} was not live in 10 s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def flip_under_streams(server: LiveServer, shop: Shop) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        begun = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(stream_label(client, event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        await asyncio.to_thread(shop.run, "promote", "acme/support@v2", "--reason", "better")
        assert await label_now(client) == "acme/support@v2"
        for stream in await asyncio.gather(*streams):
            assert stream == ("acme/support@v1", 800, True)
        await asyncio.to_thread(shop.run, "rollback", "acme/support", "--reason", "worse")
        assert await label_now(client) == "acme/support@v1"


def test_a_promote_and_a_rollback_from_another_process_are_live_under_streams(shop: Shop) -> None:
    with shop.serving("--no-auth", "--dtype", "float32") as server:
        asyncio.run(flip_under_streams(server, shop))


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    shop: Shop, tmp_path: Path
) -> None:
    base = Bases(shop.cache / "bases").get(DEFAULT_BASE)
    make_adapter(tmp_path / "v", base.path, rank=32, seed=3)
    with shop.serving("--no-auth", "--max-lora-rank", "16") as server:
        shop.run("push", str(tmp_path / "v"), "acme/support", "--base", DEFAULT_BASE)
        number = shop.json("show", "acme/support")["versions"][-1]["number"]
        printed = shop.run("promote", f"acme/support@v{number}", "--reason", "too wide", status=1)
        assert "32" in printed
        assert "16" in printed
        ready = httpx.get(f"{server.url}/health/ready").json()
        assert "32" in json.dumps(ready), ready
        assert "failed" in shop.run("show", "acme/support")
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = CHAT | {"model": "acme/support", "max_tokens": 1}
            answer = client.post("/v1/chat/completions", json=body)
        assert answer.headers["x-adapter"] == "acme/support@v1"
    shop.run("rollback", "acme/support", "--reason", "back to v1")


def test_the_operator_key_is_shown_once_and_opens_the_server(shop: Shop) -> None:
    key = shop.json("key", "rotate")["key"]
    with shop.serving() as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        replaced = shop.json("key", "rotate")["key"]
        time.sleep(1.2)
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == 401
        headers = {"Authorization": f"Bearer {replaced}"}
        assert httpx.get(url, headers=headers).status_code == 200
        log = server.log.read_text()
        assert key not in log
        operators = httpx.get(f"{server.url}/health/ready", headers=headers).json()["operators"]
        assert log.count(f"computing with {operators} in ") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "acme/nobody"), "acme/nobody"),
        (("show", "Acme/Support"), "Acme/Support"),
        (("promote", "acme/support@v99", "--reason", "x"), "v99"),
        (("push", "/nonexistent", "acme/support"), "/nonexistent"),
        (("train", "adapters/nothing"), "adapters/nothing"),
        (("train", "adapters/icd-10", "--set", "train.stepz=3"), "stepz"),
        (("base", "pull", "/nonexistent/model.gguf"), "/nonexistent/model.gguf"),
        (("serve", "--host", "0.0.0.0", "--no-auth"), "loopback"),
        (("serve", "--base", "nobody/nothing-here"), "nobody/nothing-here"),
        (("serve", "--no-auth", "--max-batched-tokens", "16"), "--max-batched-tokens=16"),
        (("serve", "--no-auth", "--max-model-len", "100000"), "--max-model-len=100000"),
        (("serve", "--no-auth", "--kv-cache-memory", "0"), "--kv-cache-memory=0"),
        (
            ("serve", "--no-auth", "--device", "cpu", "--kv-cache-memory", "900TiB"),
            f"--kv-cache-memory={900 << 40}",
        ),
    ],
)
def test_a_wrong_command_ends_with_a_sentence_and_no_traceback(
    shop: Shop, arguments: tuple[str, ...], sentence: str
) -> None:
    printed = shop.run(*arguments, status=2)
    assert sentence in printed.replace("\n", "")
    assert "Traceback" not in printed
