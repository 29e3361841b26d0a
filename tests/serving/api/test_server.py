"""The life of a server: errors inside streams, health, metrics, the drain, real signals."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serving.api.connection import IDLE_CONNECTIONS
from serving.api.listener import PortUnavailable, listen
from serving.api.settings import ServerSettings
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine
from wardrobe import app

STREAM = CHAT | {"stream": True, "max_tokens": 400}


def events_of(answer: httpx.Response) -> Iterator[Any]:
    for line in answer.iter_lines():
        if line:
            assert line.startswith("data: ")
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def test_an_error_after_the_first_byte_is_an_event_and_a_clean_end(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    with running(wardrobe, tokens, ScriptedEngine(fail_after=3)) as live:
        with (
            live.client() as client,
            client.stream("POST", "/v1/chat/completions", json=STREAM) as answer,
        ):
            events = list(events_of(answer))
        whole = live.post(CHAT)
    assert answer.status_code == 200
    assert events[-1]["error"]["code"] == "request_failed"
    assert events[-1]["error"]["request_id"] == answer.headers["x-request-id"]
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "request_failed"


def test_what_nobody_foresaw_is_a_500_without_its_inside(
    wardrobe: Wardrobe, tokens: Tokens, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> Iterator[int]:
        raise ZeroDivisionError("a secret detail")

    with running(wardrobe, tokens, ScriptedEngine(broken)) as live:
        answer = live.post(CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "a secret detail" in caplog.text, "the log has it"


def test_a_dead_engine_makes_the_server_unready(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens) as live, live.client() as client:
        healthy = client.get("/health/ready").json()
        assert (healthy["status"], healthy["operators"]) == ("ready", "script")
        live.engine.dead = "the step thread ended"
        ready = client.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["reason"] == "the step thread ended"
        assert client.get("/health/live").status_code == 200
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


def test_an_engine_that_dies_ends_its_streams_with_an_error_event(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=0.01)
    with running(wardrobe, tokens, engine) as live:
        streams = [Stream(live, 400) for _ in range(20)]
        engine.dead = "the step thread ended"
        for stream in streams:
            stream.join()
            assert stream.events[-1]["error"]["code"] == "engine_unavailable"
        assert live.post(STREAM).status_code == 503
        deadline = time.monotonic() + 2
        while live.services.drain.in_flight:
            assert time.monotonic() < deadline, "a request is still held"


def test_metrics_count_requests_tokens_and_times(live: Running) -> None:
    for _ in range(3):
        live.post(CHAT | {"model": "acme/support", "max_tokens": 5})
    live.post(CHAT | {"model": "acme/nobody"})
    with live.client() as client:
        text = client.get("/metrics").text
    route = 'route="/v1/chat/completions"'
    assert f'wardrobe_requests_total{{{route},status="200"}} 3.0' in text
    assert f'wardrobe_requests_total{{{route},status="404"}} 1.0' in text
    assert 'wardrobe_tokens_total{kind="completion",version="acme/support@v1"} 15.0' in text
    assert "wardrobe_time_to_first_token_seconds_count 3.0" in text
    assert "wardrobe_inter_token_seconds_count 12.0" in text
    assert "wardrobe_adapter_loads_total 1.0" in text
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    totals = {name for name in kinds if name.endswith("_total")}
    assert "wardrobe_engine_generated_tokens_total" in totals
    assert {kinds[name] for name in totals} == {"counter"}
    assert kinds["wardrobe_adapters"] == "gauge"
    assert 'wardrobe_adapters{tier="slot"} 1.0' in text
    assert 'wardrobe_adapter_load_stage_seconds_count{stage="read"} 1.0' in text


@pytest.mark.parametrize("text", ["<|im_end|>" * 2_400, "\u200b" * 24_000])
def test_a_big_prompt_does_not_stall_the_health_check(
    live: Running, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Encoding waits here for the answer to a health check: on the loop that would never come."""
    encoding, answered = threading.Event(), threading.Event()
    encode = tokens._encode_chat  # pyright: ignore[reportPrivateUsage] - what runs in the thread

    def encode_when_answered(*arguments: Any) -> list[int]:
        encoding.set()
        answered.wait()
        return encode(*arguments)

    monkeypatch.setattr(tokens, "_encode_chat", encode_when_answered)
    largest = CHAT | {"messages": [{"role": "user", "content": "a" * 3_900_000}]}
    assert live.post(largest).status_code == 400
    assert not encoding.is_set(), "what cannot fit is refused before it is encoded"
    big = CHAT | {"messages": [{"role": "user", "content": text}]}
    thread = threading.Thread(target=lambda: live.post(big))
    thread.start()
    try:
        with live.client() as client:
            assert encoding.wait(30)
            assert client.get("/health/live").status_code == 200
            assert thread.is_alive()
            answered.set()
            while thread.is_alive():
                assert client.get("/health/live").status_code == 200
    finally:
        answered.set()
        thread.join()


def test_a_reader_that_stops_reading_is_dropped_and_frees_its_request(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(max_model_len=200_000)
    with running(wardrobe, tokens, engine, stall_timeout=0.3) as live:
        host, port = live.url.removeprefix("http://").split(":")
        body = json.dumps(STREAM | {"max_tokens": 150_000}).encode()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((host, int(port)))
            sock.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {live.key}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            deadline = time.monotonic() + 10
            while not engine.history:
                time.sleep(0.01)
            while engine.running:
                assert time.monotonic() < deadline, "still held"
                time.sleep(0.01)
    assert engine.aborted == 1


def test_a_hundred_disconnects_leave_nothing_behind(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.002, max_running=8, max_waiting=200)
    with running(wardrobe, tokens, engine) as live:

        def leave(after: int) -> None:
            with (
                live.client() as client,
                client.stream(
                    "POST", "/v1/chat/completions", json=STREAM | {"n": 1 + after % 3}
                ) as answer,
            ):
                for _, _line in zip(range(after), answer.iter_lines(), strict=False):
                    pass

        threads = [threading.Thread(target=leave, args=(i % 10,)) for i in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        deadline = time.monotonic() + 5
        while engine.running or engine.waiting or live.services.drain.in_flight:
            assert time.monotonic() < deadline, (engine.running, engine.waiting)
            time.sleep(0.01)
        assert live.post(CHAT | {"max_tokens": 1}).status_code == 200


class Stream:
    """Reads one stream in a thread."""

    def __init__(self, live: Running, max_tokens: int) -> None:
        self.events: list[Any] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._live = live
        self._body = STREAM | {"max_tokens": max_tokens}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(5)

    def _read(self) -> None:
        try:
            with (
                self._live.client() as client,
                client.stream("POST", "/v1/chat/completions", json=self._body) as answer,
            ):
                for event in events_of(answer):
                    self.events.append(event)
                    self.begun.set()
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.error is None, "the stream was cut without a clean end"


def test_a_drain_lets_streams_finish_and_refuses_what_is_new(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=0.01)
    with running(wardrobe, tokens, engine, drain_timeout=10.0) as live:
        streams = [Stream(live, 60) for _ in range(10)]
        live.stop()
        time.sleep(0.05)
        refused = live.post(CHAT)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        with live.client() as client:
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert client.get("/health/live").status_code == 200
        for stream in streams:
            stream.join()
            assert stream.events[-1] == "[DONE]"
        live.thread.join(5)
        assert not live.thread.is_alive()


def test_what_outlives_the_drain_ends_with_an_error_event(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    with running(wardrobe, tokens, engine, drain_timeout=0.3) as live:
        streams = [Stream(live, 400) for _ in range(10)]
        began = time.monotonic()
        live.stop()
        live.thread.join(30)
        assert not live.thread.is_alive()
        assert time.monotonic() - began > 0.25
        for stream in streams:
            stream.join()
            assert stream.events[-1]["error"]["code"] == "unavailable"
    assert engine.aborted == 10


def test_a_second_stop_ends_streams_at_once(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    with running(wardrobe, tokens, engine, drain_timeout=60.0) as live:
        stream = Stream(live, 400)
        live.stop()
        live.stop()
        live.thread.join(3)
        assert not live.thread.is_alive()
        stream.join()
        assert stream.events[-1]["error"]["code"] == "unavailable"


PROGRAM = """
import asyncio
import gc
import sys
from pathlib import Path
from registry.base import Bases
from registry.store import Registry
from serving.api.listener import listen
from serving.api.server import serve
from serving.api.settings import ServerSettings
from serving.tokens import Tokens
from tests.registry.making import BASE_ID
from tests.serving.scripted import ScriptedEngine

home, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
bases = Bases(home / "bases")
with Registry.open(home / "home", bases) as registry:
    tokens = Tokens(tokenizer)
    settings = ServerSettings(port=0, auth=False, drain_timeout=20)
    engine = ScriptedEngine(step_seconds=0.01)
    serve(listen(settings), settings, registry, engine, bases.get(BASE_ID), tokens,
          on_start=lambda url: print(url, flush=True))
assert gc.get_freeze_count() > 10_000
try:
    asyncio.run(tokens.encode("a", 8))
except RuntimeError:  # its threads have ended
    print("ended well", flush=True)
"""


@pytest.mark.parametrize(("signals", "clean"), [(1, True), (2, False)])
def test_signals_drain_a_real_process(
    wardrobe: Wardrobe, tmp_path: Path, signals: int, clean: bool
) -> None:
    from tests import tiny

    tokenizer = tiny.make_base(tmp_path / "tokenizer", layers=1)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(tokenizer)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        events: list[Any] = []
        with (
            httpx.Client(base_url=url, timeout=30) as client,
            client.stream(
                "POST", "/v1/chat/completions", json=STREAM | {"max_tokens": 60}
            ) as answer,
        ):
            for event in events_of(answer):
                events.append(event)
                if len(events) in range(2, 2 + signals):
                    process.send_signal(signal.SIGTERM if len(events) == 2 else signal.SIGINT)
        assert (events[-1] == "[DONE]") is clean
        assert process.wait(10) == 0
        assert "ended well" in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_every_503_says_when_to_come_back(wardrobe: Wardrobe, tokens: Tokens) -> None:
    engine = ScriptedEngine(step_seconds=0.02)
    with running(wardrobe, tokens, engine, max_requests=1) as live, live.client() as client:
        with client.stream("POST", "/v1/chat/completions", json=STREAM) as stream:
            lines = stream.iter_lines()
            next(lines)  # and kept: an iterator that is thrown away ends its stream
            refused = client.post("/v1/chat/completions", json=CHAT)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
        host, port = live.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(IDLE_CONNECTIONS):
                stack.enter_context(socket.create_connection((host, int(port))))
            crowded = httpx.get(f"{live.url}/health/live")
        assert (crowded.status_code, crowded.headers["retry-after"]) == (503, "2")
        assert crowded.json()["error"]["code"] == "unavailable"


def test_a_port_that_is_taken_is_said_in_a_sentence(live: Running) -> None:
    port = live.services.settings.port
    with pytest.raises(PortUnavailable, match=f"Port {port} of 127.0.0.1.*in use"):
        listen(ServerSettings(port=port))


def test_a_taken_port_is_refused_before_the_base_is_read_or_a_key_is_made(
    live: Running, tmp_path: Path
) -> None:
    port, home = live.services.settings.port, tmp_path / "new-home"
    arguments = ["serve", "--base", str(tmp_path / "no-base"), "--port", str(port)]
    result = CliRunner().invoke(app, [*arguments, "--home", str(home)])
    assert result.exit_code == 2
    assert f"Port {port} of 127.0.0.1 cannot be listened on" in result.stderr
    assert not home.exists()


def test_the_per_token_path_is_cheap(live: Running, caplog: pytest.LogCaptureFixture) -> None:
    """A guard against accidents: it measures about 55 µs a token, with the scripted engine."""
    caplog.set_level(logging.ERROR)
    began = time.process_time()
    live.engine.max_model_len = 10_000
    answer = live.post(STREAM | {"max_tokens": 5_000})
    assert answer.text.count("data: ") == 5_003
    per_token = (time.process_time() - began) / 5_000
    assert per_token < 0.001
