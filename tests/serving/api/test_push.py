"""Pushing over HTTP: the gate's answers have their status, and nothing half arrives."""

import json
import pickle
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.adapter import Selector
from registry.errors import AdapterNotFound
from tests.registry.making import make_adapter
from tests.serving.live import Running, Wardrobe, running

VERSIONS = "/v1/adapters/acme/pushed/versions"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    folder = make_adapter(tmp_path / "made", seed=7)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def push(live: Running, files: Mapping[str, bytes], path: str = VERSIONS) -> httpx.Response:
    with live.client() as client:
        return client.post(path, files={name: (name, data) for name, data in files.items()})


def with_config(files: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    return {**files, CONFIG: json.dumps(json.loads(files[CONFIG]) | changes).encode()}


def test_a_push_becomes_a_version_once(
    live: Running, wardrobe: Wardrobe, files: dict[str, bytes]
) -> None:
    first, second = push(live, files), push(live, files)
    assert (first.status_code, second.status_code) == (201, 200)
    stored = wardrobe.registry.resolve(Selector.parse("acme/pushed@v1"))
    assert first.json()["digest"] == f"sha256:{stored.digest}" == second.json()["digest"]
    assert (first.json()["id"], first.json()["number"]) == ("acme/pushed@v1", 1)
    assert (first.json()["created"], second.json()["created"]) == (True, False)
    assert live.post({"model": "acme/pushed@v1", "prompt": "a"}, "/v1/completions").is_success


def test_what_was_pushed_is_expected_to_be_asked_for(
    live: Running, wardrobe: Wardrobe, files: dict[str, bytes]
) -> None:
    push(live, with_config(files, r=7))
    assert live.engine.prefetched == [], "it was refused"
    push(live, files)
    stored = wardrobe.registry.resolve(Selector.parse("acme/pushed@v1"))
    assert live.services.router.known(Selector.parse("acme/pushed@v1")) == stored
    [(digest, read)] = live.engine.prefetched
    assert (digest, b"".join(read.weights)) == (stored.digest, files[WEIGHTS])
    assert sha256(read.config).hexdigest() == stored.files[CONFIG]


def test_what_was_pushed_for_another_base_is_not_loaded_here(
    live: Running, wardrobe: Wardrobe, files: dict[str, bytes], tmp_path: Path
) -> None:
    made = tmp_path / "other"
    shutil.copytree(wardrobe.base.path, made)
    (made / "base.json").unlink()
    wardrobe.registry.bases.add("other", made, origin="test")
    answer = push(live, with_config(files, base_model_name_or_path="other"))
    assert (answer.status_code, answer.json()["base"]) == (201, "other")
    assert live.engine.prefetched == []


def refusals(files: dict[str, bytes]) -> dict[str, tuple[dict[str, bytes], int, str]]:
    """Return what is pushed, its status, and a word of the sentence."""
    a_pickle = pickle.dumps({"weights": 1})
    return {
        "a pickle by name": ({**files, "adapter_model.bin": a_pickle}, 422, "safetensors"),
        "a pickle in disguise": ({**files, WEIGHTS: a_pickle}, 422, "pickle"),
        "a program beside": ({**files, "setup.py": b"print()"}, 422, "setup.py"),
        "a path": ({**files, "../../x": b"x"}, 422, "../../x"),
        "no weights": ({CONFIG: files[CONFIG]}, 422, WEIGHTS),
        "no config": ({WEIGHTS: files[WEIGHTS]}, 422, CONFIG),
        "torn weights": ({**files, WEIGHTS: files[WEIGHTS][:-3]}, 422, WEIGHTS),
        "a config that is no JSON": ({**files, CONFIG: b"{"}, 422, CONFIG),
        "another rank": (with_config(files, r=7), 422, "7"),
        "raw PiSSA": (with_config(files, init_lora_weights="pissa"), 422, "pissa"),
        "a base nobody has": (
            with_config(files, base_model_name_or_path="nobody/nothing"),
            404,
            "nobody/nothing",
        ),
    }


CASES = sorted(refusals({CONFIG: b"{}", WEIGHTS: b""}))


@pytest.mark.parametrize("case", CASES)
def test_what_the_gate_refuses_has_its_status_and_a_sentence(
    live: Running, wardrobe: Wardrobe, files: dict[str, bytes], case: str
) -> None:
    pushed, status, word = refusals(files)[case]
    answer = push(live, pushed)
    assert (answer.status_code, word in answer.json()["error"]["message"]) == (status, True), (
        answer.text
    )
    with pytest.raises(AdapterNotFound):
        wardrobe.registry.resolve(Selector.parse("acme/pushed@v1"))
    assert list((wardrobe.registry.home / "staging").iterdir()) == []


def test_an_adapter_of_another_base_is_422(
    live: Running, wardrobe: Wardrobe, files: dict[str, bytes]
) -> None:
    card = {"base": {"id": wardrobe.base.id, "structure": "0" * 64}}
    answer = push(live, {**files, "wardrobe.json": json.dumps(card).encode()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "base_mismatch")


def test_a_name_that_cannot_be_one_is_refused(live: Running, files: dict[str, bytes]) -> None:
    answer = push(live, files, "/v1/adapters/Acme/pushed/versions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_name")


def test_a_body_that_is_no_form_says_what_a_push_is(live: Running) -> None:
    with live.client() as client:
        answer = client.post(VERSIONS, json={})
        broken = client.post(
            VERSIONS,
            content=b"nonsense",
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        twice = client.post(VERSIONS, files=[(CONFIG, (CONFIG, b"{}")), (CONFIG, (CONFIG, b"{}"))])
    assert (answer.status_code, "curl -F" in answer.text) == (415, True)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_multipart")
    assert (twice.status_code, "two parts" in twice.text) == (400, True)


def test_a_push_needs_a_key(live: Running, files: dict[str, bytes]) -> None:
    with httpx.Client(base_url=live.url) as client:
        answer = client.post(VERSIONS, files={name: (name, data) for name, data in files.items()})
    assert answer.status_code == 401


def test_a_push_over_the_bound_is_413(
    wardrobe: Wardrobe, tokens: Any, files: dict[str, bytes]
) -> None:
    with running(wardrobe, tokens, max_push_bytes=100) as live:
        assert push(live, files).status_code == 413
