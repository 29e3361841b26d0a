"""A small OpenAI-compatible server on loopback that answers by a function and keeps a history."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# (system, user, seed) → what the model says; None is a request that is refused, and what ends
# with … was cut off at max_tokens
Script = Callable[[str, str, int], str | None]


@dataclass
class ScriptedEndpoint:
    url: str
    script: Script
    history: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: set[str] = field(default_factory=set[str])


@contextmanager
def scripted_endpoint(script: Script) -> Iterator[ScriptedEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            endpoint.history.append(body)
            endpoint.keys.add(self.headers["authorization"])
            system, user = (message["content"] for message in body["messages"])
            said = endpoint.script(system, user, body["seed"])
            if said is None:
                self._send(400, {"error": {"message": "scripted refusal"}})
            else:
                self._send(200, _completion(body["model"], said))

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base's name
            """Keep the test's output clean: the history says more."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = ScriptedEndpoint(f"http://127.0.0.1:{server.server_port}/v1", script)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _completion(model: str, said: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": said}
    cut = said.endswith("…")
    choice = {"index": 0, "finish_reason": "length" if cut else "stop", "message": message}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
    }
