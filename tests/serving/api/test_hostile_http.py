"""Bytes that no decent client sends. Nothing may be a 5xx, hang, or reach a second request."""

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import httpx
import pytest

from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, opened, running

PATH = "/v1/chat/completions"
BODY = json.dumps(CHAT | {"max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokens: Tokens) -> Iterator[Running]:
    with (
        opened(tmp_path_factory.mktemp("hostile")) as wardrobe,
        running(wardrobe, tokens, header_timeout=0.5, body_timeout=0.5) as live,
    ):
        yield live


def talk(server: Running, data: bytes, seconds: float = 10.0) -> bytes:
    """Send raw bytes and read to the end of the connection, or to the first answer's end."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        # The answer may still be there to read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
        received = b""
        try:
            while chunk := sock.recv(65536):
                received += chunk
        except ConnectionResetError:
            pass
        return received


def head(server: Running, *lines: str, path: str = PATH, verb: str = "POST") -> bytes:
    start = [f"{verb} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {server.key}"]
    return "\r\n".join([*start, "Connection: close", *lines, "", ""]).encode("latin-1")


def post(server: Running, body: bytes, *lines: str) -> bytes:
    length = f"Content-Length: {len(body)}"
    return talk(server, head(server, "Content-Type: application/json", length, *lines) + body)


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, str]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_decent_request_goes_through_this_very_socket(server: Running) -> None:
    assert status_of(post(server, BODY)) == 200


DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "invalid_json"),
    "not json": (b"hello", "invalid_json"),
    "null": (b"null", "invalid_value"),
    "list": (b"[]", "invalid_value"),
    "number": (b"7", "invalid_value"),
    "a number without end": (b'{"n":' + b"1" * 5000 + b',"n":1,' + BODY[1:], "invalid_json"),
    "cut": (BODY[:-5], "invalid_json"),
    "two documents": (BODY + BODY, "invalid_json"),
    "NUL": (b"\x00" + BODY, "invalid_json"),
    "BOM": (b"\xef\xbb\xbf" + BODY, "invalid_json"),
    "utf-16": (BODY.decode().encode("utf-16"), "invalid_json"),
    "invalid utf-8": (BODY.replace(b"hello", b"\xff\xfe"), "invalid_json"),
    "invalid utf-8 key": (BODY.replace(b'"model"', b'"mod\xffel"'), "invalid_json"),
    "overlong utf-8": (BODY.replace(b"hello", b"\xc0\xaf"), "invalid_json"),
    "lone surrogate": (BODY.replace(b"hello", b"\\ud800"), "invalid_json"),
    "bad escape": (BODY.replace(b"hello", b"\\x00"), "invalid_json"),
    "deep list": (DEEP, "invalid_json"),
    "deep value": (b'{"model":' + DEEP + b"}", "invalid_json"),
    "deep messages": (b'{"model":"base","messages":' + DEEP + b"}", "invalid_json"),
    "deep unsupported": (b'{"model":"base","messages":[],"tools":' + DEEP + b"}", "invalid_json"),
    "NaN": (BODY[:-1] + b',"temperature":NaN}', "invalid_json"),
    "Infinity": (BODY[:-1] + b',"temperature":Infinity}', "invalid_json"),
    "1e999": (BODY[:-1] + b',"temperature":1e999}', "invalid_json"),
    "5,000 digits": (BODY[:-1] + b',"seed":' + b"9" * 5000 + b"}", "invalid_value"),
    "missing model": (b'{"messages":[]}', "missing_field"),
    "unknown field": (BODY[:-1] + b',"lora_path":"/etc"}', "unknown_parameter"),
    "template": (BODY[:-1] + b',"chat_template":"{{1}}"}', "unknown_parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_a_broken_body_is_a_400_in_the_envelope(server: Running, case: str) -> None:
    body, code = BODIES[case]
    answer = post(server, body)
    assert status_of(answer) == 400, answer[-300:]
    error = error_of(answer)
    assert error["request_id"].startswith("req_")
    assert error["code"] in {code, "invalid_value", "invalid_json"}
    if code not in {"invalid_json", "invalid_value"}:
        assert error["code"] == code


SCHEMA = b'{"type":"json_schema","json_schema":{"name":"s","schema":{"type":1,"type":2}}}'
TWICE: dict[str, tuple[bytes, str]] = {
    "a field": (b'{"max_tokens":1,"n":1,' + BODY[1:], "max_tokens"),
    "a null": (b'{"seed":null,"seed":1,' + BODY[1:], "seed"),
    "written otherwise": (b'{"mod\\u0065l":"base",' + BODY[1:], "model"),
    "in a message": (BODY.replace(b'"role"', b'"role": "system", "role"'), "role"),
    "in a schema": (b'{"response_format":' + SCHEMA + b"," + BODY[1:], "type"),
}


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_comes_twice_is_named_and_refused(server: Running, case: str) -> None:
    body, key = TWICE[case]
    answer = post(server, body)
    error = error_of(answer)
    assert (status_of(answer), error["code"], error["param"]) == (400, "duplicate_key", key)
    assert repr(key) in error["message"]


def test_a_key_that_comes_twice_is_refused_on_every_route(server: Running) -> None:
    body = b'{"lora_name": "a", "lora_path": "acme/support@v1", "lora_name": "b"}'
    lines = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    answer = talk(server, head(server, *lines, path="/v1/load_lora_adapter") + body)
    assert (status_of(answer), error_of(answer)["param"]) == (400, "lora_name")


def test_one_key_in_two_objects_is_nothing_to_refuse(server: Running) -> None:
    messages = [{"role": "user", "content": '{"a": 1, "a": 2}'}] * 2
    body = json.dumps(CHAT | {"max_tokens": 1, "messages": messages}).encode()
    assert status_of(post(server, body)) == 200


def test_an_address_that_leads_nowhere_is_named_with_what_there_is(server: Running) -> None:
    with server.client() as client:
        lost = client.post("/chat/completions", json=CHAT)  # a base_url without /v1
        assert (lost.status_code, lost.json()["error"]["code"]) == (404, "route_not_found")
        said = lost.json()["error"]["message"]
        assert said.startswith("There is no POST '/chat/completions' here.")
        assert "/v1/chat/completions" in said
        wrong = client.get("/v1/chat/completions")
        assert wrong.status_code == 405
        assert "GET '/v1/chat/completions'" in wrong.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", "-1"), ("temperature", "2.5"), ("n", "1e9")]
)
def test_a_number_out_of_bounds_is_told_with_its_value(
    server: Running, field: str, value: str
) -> None:
    body = json.dumps(CHAT)
    error = error_of(post(server, (body[:-1] + f',"{field}":{value}}}').encode()))
    assert (error["param"], error["code"]) == (field, "invalid_value")
    assert error["message"].endswith(f"(sent: {value})")


def raw_cases(server: Running) -> dict[str, tuple[bytes, set[int]]]:
    te = "Transfer-Encoding: chunked"
    key = f"Authorization: Bearer {server.key}\r\n"
    json_type = "Content-Type: application/json"
    length = f"Content-Length: {len(BODY)}"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    line = f"POST {PATH} HTTP/1.1\r\n"
    whole = f"{key}{json_type}\r\n{length}\r\nConnection: close\r\n\r\n".encode() + BODY
    return {
        "CL and TE": (head(server, length, te, json_type) + chunked, {400}),
        "TE and CL": (head(server, te, length, json_type) + chunked, {400}),
        "two CL": (head(server, length, "Content-Length: 3", json_type) + BODY, {400}),
        "CL list": (head(server, f"{length}, 3", json_type) + BODY, {400}),
        "CL +": (head(server, f"Content-Length: +{len(BODY)}", json_type) + BODY, {400}),
        "CL minus": (head(server, "Content-Length: -1", json_type) + BODY, {400}),
        "CL huge digits": (head(server, f"Content-Length: {'9' * 4000}", json_type), {400, 413}),
        "TE identity, chunked": (
            head(server, "Transfer-Encoding: identity, chunked", json_type) + chunked,
            {400, 501},
        ),
        "TE twice": (head(server, te, te, json_type) + chunked, {400, 501}),
        "TE unknown": (head(server, "Transfer-Encoding: gzip", json_type) + chunked, {400, 501}),
        "TE tab": (head(server, "Transfer-Encoding:\tchunked", json_type) + chunked, {200, 400}),
        "chunk size junk": (head(server, te, json_type) + b"zz\r\n", {400}),
        "chunk size huge": (head(server, te, json_type) + b"f" * 40 + b"\r\n", {400}),
        "chunk terminator": (head(server, te, json_type) + b"3\r\nabcXX0\r\n\r\n", {400}),
        "good chunks": (head(server, te, json_type) + chunked, {200}),
        "no Host": (line.encode() + whole, {400}),
        "two Hosts": (f"{line}Host: a\r\nHost: b\r\n".encode() + whole, {400}),
        "no Host, 1.0": (f"POST {PATH} HTTP/1.0\r\n".encode() + whole, {400}),
        "obs-fold": (f"{line}Host: x\r\nX-A: 1\r\n 2\r\n".encode() + whole, {200, 400}),
        "bare LF": ((line + "Host: x\r\n").replace("\r\n", "\n").encode() + whole, {200, 400}),
        "bare CR": (f"{line}Host: x\r\nX-A: a\rb\r\n".encode() + whole, {400}),
        "NUL in header": (f"{line}Host: x\r\nX-A: a\0b\r\n".encode() + whole, {400}),
        "space before colon": (f"{line}Host: x\r\nX-A : b\r\n".encode() + whole, {400}),
        "no colon": (f"{line}Host: x\r\nnonsense\r\n".encode() + whole, {400}),
        "empty name": (f"{line}Host: x\r\n: b\r\n".encode() + whole, {400}),
        "8-bit header": (f"{line}Host: x\r\n".encode() + b"X-A: \xff\xfe\r\n" + whole, {200, 400}),
        "8-bit key": (
            f"{line}Host: x\r\n".encode()
            + b"Authorization: Bearer \xff\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            {401},
        ),
        "101 headers": (
            head(server, *(f"X-{i}: 1" for i in range(101)), json_type, length) + BODY,
            {431},
        ),
        "20,000 headers": (
            head(server, *(f"X-{i}: 1" for i in range(20_000)), json_type),
            {400, 431},
        ),
        "40 KiB header": (head(server, "X-A: " + "a" * 40_960, json_type, length) + BODY, {431}),
        "1 MiB header": (head(server, "X-A: " + "a" * 2**20, json_type), {400, 431}),
        "1 MiB URL": (head(server, path="/" + "a" * 2**20, verb="GET"), {400, 414, 431}),
        "40 KiB URL": (head(server, path="/" + "a" * 40_960, verb="GET"), {404, 414}),
        "absolute URL": (head(server, path="http://evil/v1/models", verb="GET"), {200, 400, 404}),
        "asterisk": (head(server, path="*", verb="OPTIONS"), {400, 404, 405}),
        "dots": (head(server, path="/v1/../metrics/../v1/models", verb="GET"), {404}),
        "encoded dots": (head(server, path="/v1/%2e%2e/%2e%2e/etc/passwd", verb="GET"), {404}),
        "encoded NUL": (head(server, path="/v1/models/%00", verb="GET"), {404}),
        "invalid percent": (head(server, path="/v1/models/%ff%zz", verb="GET"), {404}),
        "path tricks in a model": (
            head(server, path="/v1/models/../../etc/passwd", verb="GET"),
            {404},
        ),
        "CONNECT": (head(server, path="x:80", verb="CONNECT"), {400, 404, 405}),
        "strange verb": (head(server, verb="FROB"), {400, 405}),
        "lower-case verb": (head(server, verb="post"), {400, 405}),
        "HTTP/9.9": (b"GET / HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n", {400, 404, 505}),
        "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        "TLS hello": (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",
            {400},
        ),
        "junk": (b"\r\n\r\n\x00\x01\x02\r\n\r\n", {400}),
        "websocket": (
            head(
                server, "Upgrade: websocket", "Connection: Upgrade", verb="GET", path="/v1/models"
            ),
            {200, 400, 404},
        ),
        "no media type": (head(server, length) + BODY, {415}),
        "form": (
            head(server, length, "Content-Type: application/x-www-form-urlencoded") + BODY,
            {415},
        ),
        "text": (head(server, length, "Content-Type: text/plain") + BODY, {415}),
        "broken media type": (head(server, length, "Content-Type: ;;;=") + BODY, {415}),
        "odd charset": (
            head(server, length, "Content-Type: application/json; charset=utf-7") + BODY,
            {200, 415},
        ),
        "zipped": (head(server, length, json_type, "Content-Encoding: gzip") + BODY, {200, 415}),
        "body on GET": (head(server, length, verb="GET", path="/v1/models") + BODY, {200}),
        "body never comes": (head(server, "Content-Length: 10", json_type) + b"abc", {408}),
        "chunks never end": (head(server, te, json_type) + b"3\r\nabc\r\n", {408}),
        "5 MiB by length": (
            head(server, "Content-Length: 5242880", json_type) + b" " * 5242880,
            {413},
        ),
        "5 MiB in chunks": (
            head(server, te, json_type)
            + b"10000\r\n"
            + (b" " * 65536 + b"\r\n10000\r\n") * 80
            + b" " * 65536
            + b"\r\n0\r\n\r\n",
            {413},
        ),
        "5 MiB without a key": (
            f"{line}Host: x\r\nConnection: close\r\nContent-Length: 4000000\r\n\r\n".encode()
            + b" " * 4_000_000,
            {401},
        ),
        "expect, too large": (
            head(server, "Content-Length: 5242880", "Expect: 100-continue"),
            {413},
        ),
    }


def test_hostile_bytes_are_refused_and_the_client_can_read_why(server: Running) -> None:
    cases = raw_cases(server)
    assert len(cases) + len(BODIES) >= 60
    wrong: list[str] = []
    for name, (data, allowed) in cases.items():
        try:
            answer = talk(server, data, seconds=8)
        except TimeoutError:
            wrong.append(f"{name}: the connection hangs")
            continue
        status = status_of(answer) if answer else 0
        if status >= 400 and not error_of(answer)["message"]:
            wrong.append(f"{name}: an error without its envelope")
        if status not in allowed:
            wrong.append(f"{name}: {status or 'no answer'}, not {sorted(allowed)}")
    assert wrong == []
    assert status_of(post(server, BODY)) == 200, "and goes on serving"


def test_a_smuggled_second_request_is_never_run(server: Running) -> None:
    before = server.engine.generated
    inner = head(server, f"Content-Length: {len(BODY)}", "Content-Type: application/json") + BODY
    lines = ["Transfer-Encoding: chunked", f"Content-Length: {5 + len(inner)}"]
    answer = talk(
        server, head(server, *lines, "Content-Type: application/json") + b"0\r\n\r\n" + inner
    )
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1
    assert server.engine.generated == before


def test_slow_headers_are_closed_while_others_are_served(
    wardrobe: Wardrobe, tokens: Tokens
) -> None:
    with running(wardrobe, tokens, header_timeout=2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(50)]
        for sock in slow:
            sock.sendall(b"GET / HT")
        with server.client() as client:
            assert client.get("/health/live").status_code == 200
        closed, _, _ = select.select(slow, [], [], 0)
        assert closed == [], "others are served before"
        for sock in slow:
            with sock, contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""


def test_a_keep_alive_connection_outlives_the_header_deadline(server: Running) -> None:
    limits = httpx.Limits(max_connections=1)
    with server.client(limits=limits) as client:
        for _ in range(3):
            assert client.get("/health/live").status_code == 200
            time.sleep(0.4)


@pytest.mark.long
def test_an_idle_connection_outlives_what_a_client_keeps_it_for(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as sock:
        for pause in (0, 16, 61):  # aiohttp keeps one for 15 seconds, many a balancer for 60
            time.sleep(pause)
            sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = HTTPResponse(sock)
            answer.begin()
            assert answer.status == 200, f"after {pause} seconds"
            answer.read()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 17), ("n", 10**9), ("n", 0), ("n", -1), ("n", 1.5), ("n", True), ("n", "1"),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**9), ("max_tokens", 2**70),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", []),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 10**9), ("min_p", 2),
        ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("seed", 2**64), ("seed", "x"), ("stop", ["x"] * 17), ("stop", ""), ("stop", [""]),
        ("stop", "x" * 257), ("stop", [1]), ("min_tokens", -1), ("logprobs", "yes"),
        ("top_logprobs", 21), ("stream", "yes"), ("stream_options", {"include_usage": True}),
        ("stream_options", {"surprise": 1}), ("model", ""), ("model", 7), ("model", "x" * 301),
        ("messages", []), ("messages", "hi"), ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user"}]), ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        ("messages", [{"role": "user", "content": "x", "tool_calls": []}]),
        ("tools", [{}]), ("response_format", {"type": "json"}), ("logit_bias", {"1": 101}),
        ("echo", True), ("best_of", 2), ("suffix", "x"), ("audio", {}), ("store", True),
        ("user", 7), ("metadata", {"a": 1}),
    ],
)  # fmt: skip
def test_every_bound_names_its_field(server: Running, field: str, value: object) -> None:
    answer = server.post(CHAT | {field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    neutral = {
        "max_tokens": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "tools": [],
        "logit_bias": {}, "response_format": {"type": "text"}, "temperature": None, "stop": None,
        "service_tier": "auto",
    }  # fmt: skip
    assert server.post(CHAT | neutral).status_code == 200


def test_too_long_is_said_with_both_numbers(server: Running) -> None:
    answer = server.post(CHAT | {"max_tokens": 511})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "511" in error["message"]
    raw = server.post({"model": "base", "prompt": [1] * 600}, "/v1/completions")
    assert raw.json()["error"]["code"] == "context_length_exceeded"
    assert raw.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [1, "a"], [300], [-1], ["x"] * 65, 7, {}],
)
def test_prompts_that_are_none_are_refused(server: Running, prompt: object) -> None:
    answer = server.post({"model": "base", "prompt": prompt}, "/v1/completions")
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "model",
    ["nobody", "acme/nobody", "acme/support@canary", "acme/support@v9", "acme/x@sha256:00000000",
     "../etc/passwd", "a/b/c", "ACME/Support", "acme/support@", "acme/\x00", "é" * 50, "base@v1"],
)  # fmt: skip
def test_a_model_that_is_not_there_is_a_404_and_never_the_base(server: Running, model: str) -> None:
    before = server.engine.generated
    answer = server.post(CHAT | {"model": model})
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["param"] == "model"
    assert server.engine.generated == before
