"""Who was refused for want of room and comes back at once is refused with its body unread."""

from collections.abc import Iterator

import httpx
import pytest

from serving.api import door
from serving.tenants.keys import INFER, add_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine

PATH = "/v1/chat/completions"
NONSENSE = b"{"  # who looks at it says 400


@pytest.fixture
def full(wardrobe: Wardrobe, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server without room, whose door forgets nobody while a test runs."""
    monkeypatch.setattr(door, "FRESH_SECONDS", 600.0)
    with running(wardrobe, tokens, ScriptedEngine(max_running=0, max_waiting=0)) as server:
        yield server


def sent(client: httpx.Client, body: bytes, path: str = PATH) -> httpx.Response:
    return client.post(path, content=body, headers={"content-type": "application/json"})


def test_who_comes_back_is_refused_as_before_and_unread(full: Running) -> None:
    with full.client() as client:
        assert sent(client, NONSENSE).status_code == 400, "nobody was refused yet"
        first, again = client.post(PATH, json=CHAT), sent(client, NONSENSE)
        count = client.get("/metrics").text
    assert (first.status_code, again.status_code) == (429, 429)
    told = [answer.json()["error"] for answer in (first, again)]
    assert told[0].pop("request_id") != told[1].pop("request_id")
    assert told[0] == told[1]
    assert told[0]["code"] == "engine_busy"
    assert first.headers.keys() == again.headers.keys()
    assert {"retry-after", "x-ratelimit-remaining-requests"} <= again.headers.keys()
    assert f'wardrobe_requests_total{{route="{PATH}",status="429"}} 2.0' in count


def test_who_comes_back_when_there_is_room_is_answered(full: Running) -> None:
    assert full.post(CHAT).status_code == 429
    full.engine.max_running = 1
    assert full.post(CHAT).status_code == 200


def test_nobody_else_is_refused_in_its_place(full: Running, wardrobe: Wardrobe) -> None:
    """Not another key, not another address, and a wrong key hears that it is wrong."""
    assert full.post(CHAT).status_code == 429
    other = add_key(wardrobe.registry, "acme", (INFER,))
    for key, status in ((other, 400), (full.key[:-1] + "x", 401), ("x", 401), (full.key, 429)):
        with httpx.Client(base_url=full.url, headers={"authorization": f"Bearer {key}"}) as client:
            assert sent(client, NONSENSE).status_code == status
    with full.client() as client:
        assert sent(client, NONSENSE, "/v1/completions").status_code == 400
    with httpx.Client(base_url=full.url) as client:
        assert sent(client, NONSENSE).status_code == 401


def test_a_second_later_it_goes_the_whole_way_again(
    full: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "FRESH_SECONDS", -1.0)  # the second is over
    with full.client() as client:
        assert client.post(PATH, json=CHAT).status_code == 429
        assert sent(client, NONSENSE).status_code == 400


def test_the_door_remembers_no_more_than_so_many(
    full: Running, wardrobe: Wardrobe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_TURNED_AWAY", 1)
    assert full.post(CHAT).status_code == 429
    other = add_key(wardrobe.registry, "acme", (INFER,))
    with httpx.Client(base_url=full.url, headers={"authorization": f"Bearer {other}"}) as client:
        assert client.post(PATH, json=CHAT).status_code == 429
        assert sent(client, NONSENSE).status_code == 429
    with full.client() as client:
        assert sent(client, NONSENSE).status_code == 400
