"""What the operator's URL is told: every decision, signed, again after a failure, in order."""

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from serving.experiments import webhook
from serving.experiments.experiment import Experiment
from serving.experiments.moves import move
from serving.experiments.outbox import MAX_WAITING
from serving.experiments.store import Experiments
from serving.experiments.webhook import Deliveries, Webhook, WebhookInvalid
from tests.serving.experiments.stored import created

KEY = bytes(range(32))
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"


@dataclass(slots=True)
class Receiver:
    """A server that keeps what it gets, and answers with the statuses it is given first."""

    statuses: list[int] = field(default_factory=list[int])
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""


@contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
            self.send_header("location", receiver.url)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name there
            """Stay quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(webhook, "WAITS", (0.01, 0.01))


def tell(store: Experiments, url: str, attempts: int) -> list[str]:
    """Run the loop until so many attempts were made; return how they ended."""
    ended: list[str] = []

    async def run() -> None:
        enough = asyncio.Event()

        def count(result: str) -> None:
            ended.append(result)
            if len(ended) == attempts:
                enough.set()

        deliveries = Deliveries(store.outbox, Webhook.parse(url, SECRET), count)
        deliveries.start()
        async with asyncio.timeout(20):
            await enough.wait()
        await deliveries.stop()

    asyncio.run(run())
    return ended


def decided(store: Experiments) -> Experiment:
    """Let the webhook begin, then decide: create, start, stop."""
    store.outbox.begin()
    experiment = created(store)
    running = move(store, experiment, "start", exposure=0.1, actor="ann", reason="go")
    return move(store, running, "stop", exposure=None, actor="ann", reason="enough")


def test_every_decision_is_told_once_in_order_and_signed(store: Experiments) -> None:
    experiment = decided(store)
    with receiving(Receiver()) as receiver:
        assert tell(store, receiver.url, 3) == ["delivered"] * 3
    bodies = [json.loads(body) for _, body in receiver.got]
    assert [body["data"]["action"] for body in bodies] == ["create", "start", "stop"]
    assert {body["data"]["experiment"] for body in bodies} == {experiment.id}
    assert bodies[1]["data"]["reason"] == "go"
    for headers, body in receiver.got:
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        wanted = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
        assert headers["webhook-signature"] == f"v1,{wanted}"
    assert [d.webhook for d in store.decisions(experiment.id)] == ["delivered"] * 3


def test_a_signature_is_the_one_of_the_specification() -> None:
    """The example of Standard Webhooks' own reference libraries."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = webhook.signed(
        key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_failure_is_tried_again_with_the_same_id_and_then_given_up(store: Experiments) -> None:
    experiment = decided(store)
    statuses = [500, 302, 204, 500, 500, 500]  # told at the third attempt; given up after three
    with receiving(Receiver(statuses)) as receiver:
        ended = tell(store, receiver.url, 7)
    assert ended == ["failed", "failed", "delivered", "failed", "failed", "failed", "delivered"]
    ids = [headers["webhook-id"] for headers, _ in receiver.got]
    assert ids == [ids[0]] * 3 + [ids[3]] * 3 + [ids[6]]
    assert len(set(ids)) == 3
    noted = [d.webhook for d in store.decisions(experiment.id)]
    assert noted == ["delivered", "given up: HTTP 500", "delivered"]


def test_what_was_decided_before_there_was_a_webhook_is_not_told(store: Experiments) -> None:
    old = created(store)
    store.outbox.begin()
    move(store, old, "stop", exposure=None, actor="ann", reason="late")
    with receiving(Receiver()) as receiver:
        tell(store, receiver.url, 1)
    assert [json.loads(body)["data"]["action"] for _, body in receiver.got] == ["stop"]


def test_a_decision_is_held_by_one_server_and_taken_over_when_that_one_dies(
    store: Experiments,
) -> None:
    decided(store)
    taken = store.outbox.take(3600)
    assert taken is not None
    assert store.outbox.take(3600) is None, "another server has it"
    store.outbox.failed(taken.seq, "killed", -1)
    again = store.outbox.take(3600)
    assert again is not None
    assert (again.seq, again.attempts) == (taken.seq, 1)


def test_a_queue_that_nobody_empties_has_an_end(
    store: Experiments, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_WAITING > 2
    monkeypatch.setattr("serving.experiments.outbox.MAX_WAITING", 2)
    decided(store)
    taken = store.outbox.take(3600)
    assert taken is not None
    assert taken.data["action"] == "start", "the oldest of three is passed over"


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("file:///etc/passwd", SECRET),
        ("ftp://example.com/", SECRET),
        ("https://", SECRET),
        ("http://host:port/", SECRET),
        ("https://example.com/", ""),
        ("https://example.com/", "whsec_c2hvcnQ="),
        ("https://example.com/", SECRET.removeprefix("whsec_")),
        ("https://example.com/", "whsec_not base64"),
    ],
)
def test_a_webhook_that_could_not_work_is_refused_at_start(url: str, secret: str) -> None:
    with pytest.raises(WebhookInvalid) as refused:
        Webhook.parse(url, secret)
    assert not secret or secret not in refused.value.message


def test_the_key_is_not_in_what_is_printed() -> None:
    hook = Webhook.parse("https://example.com/hook", SECRET)
    assert "key" not in repr(hook)
