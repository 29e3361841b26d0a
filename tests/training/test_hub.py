"""The Hub as its client speaks to it: a small server with the two routes a pull uses."""

import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from registry.base import BaseModel, Bases
from training.base import pull_base
from training.errors import HubUnreachable
from training.hub import list_base_files

REPO, COMMIT = "tiny/model", "a" * 40


class HubHandler(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, asked: list[str], *args: object) -> None:
        self.folder, self.asked = folder, asked
        super().__init__(*args)  # type: ignore[arg-type]  # as the server calls it

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
        pass

    def _answer(self, body: bool) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        if self.path.startswith(f"/api/models/{REPO}"):
            files = [
                {"rfilename": path.name, "size": path.stat().st_size}
                for path in sorted(self.folder.iterdir())
            ]
            data = json.dumps({"id": REPO, "sha": COMMIT, "siblings": files}).encode()
        elif self.path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.asked.append(name)
            data = (self.folder / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def hub(tiny_base: BaseModel, tmp_path: Path, asked: list[str]) -> Iterator[str]:
    folder = tmp_path / "repo"
    folder.mkdir()
    for path in tiny_base.path.iterdir():
        if path.name != "base.json":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, folder, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_pulled_without_code_and_pickles(
    hub: str, asked: list[str], tiny_base: BaseModel, tmp_path: Path
) -> None:
    bases = Bases(tmp_path / "bases")
    pulled = pull_base(REPO, bases, progress=lambda _: None, endpoint=hub)
    assert pulled.id == REPO
    assert pulled.fingerprint == tiny_base.fingerprint
    assert COMMIT in pulled.origin
    assert {"pytorch_model.bin", "modeling_tiny.py"}.isdisjoint(asked)
    assert {path.name for path in pulled.path.iterdir()}.isdisjoint({".cache"})


def test_a_hub_that_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(HubUnreachable):
        list_base_files(REPO, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)
