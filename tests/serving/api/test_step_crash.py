"""A step of the real engine that crashes, seen over HTTP."""

import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from serving.engine.boundary import Engine
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.model_runner import Forward
from serving.engine.settings import EngineSettings
from serving.tokens import Tokens
from tests import tiny
from tests.serving.engine.driving import base_of
from tests.serving.live import Wardrobe, running
from tests.serving.scripted import ScriptedEngine

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=4, max_model_len=256)
BODY = {"model": "base", "prompt": "hello", "max_tokens": 4, "temperature": 0}


class Breaking:
    """A model whose forward pass fails while `broken` is set."""

    def __init__(self, model: Forward) -> None:
        self.model, self.broken = model, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, *arguments: Any) -> torch.Tensor:
        if self.broken.is_set():
            raise RuntimeError("injected")
        return self.model.forward(*arguments)


@pytest.fixture
def model(tmp_path: Path) -> Breaking:
    base = tiny.make_base(tmp_path / "runnable")
    return Breaking(read_model(base_of(base), SETTINGS))


def test_a_crash_inside_a_step_is_a_500_and_the_next_request_is_answered(
    wardrobe: Wardrobe, tokens: Tokens, model: Breaking
) -> None:
    parts = assemble(cast("Forward", model), wardrobe.registry.find_files, SETTINGS)
    engine: Engine = TorchEngine(parts, SETTINGS)
    with running(wardrobe, tokens, cast("ScriptedEngine", engine)) as live, live.client() as client:
        before = client.post("/v1/completions", json=BODY)
        assert before.status_code == 200
        model.broken.set()
        failed = client.post("/v1/completions", json=BODY)
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "request_failed"
        streamed = client.post("/v1/completions", json=BODY | {"stream": True})
        assert streamed.status_code == 500 or '"error"' in streamed.text
        model.broken.clear()
        after = client.post("/v1/completions", json=BODY)
        assert after.status_code == 200
        assert after.json()["choices"] == before.json()["choices"]
        assert client.get("/health/ready").status_code == 200
