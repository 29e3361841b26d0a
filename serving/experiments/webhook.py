"""Tells one URL of every decision, signed, away from the requests: Standard Webhooks 1.0.

The URL is the operator's and comes from the command line only. The header `webhook-signature` is
`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; `webhook-id` is the same in every
attempt at one decision, so that who receives it twice can tell. Redirects are not followed.

Format: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import msgspec

from registry.errors import StoreUnavailable, WardrobeError
from serving.experiments.outbox import Message, Outbox

SECRET_PREFIX = "whsec_"  # noqa: S105  # how a secret is written, not one
SECRET_BYTES = (24, 64)
POLL_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0
WAITS = (1.0, 5.0, 30.0, 120.0)  # seconds between attempts; after the last it is given up
LEASE_SECONDS = 30.0  # that a decision is held for one attempt, beyond the wait before it

log = logging.getLogger("wardrobe.webhook")


class WebhookInvalid(WardrobeError):
    code = "webhook_invalid"


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where decisions are told, and the key that signs them."""

    url: str
    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, url: str, secret: str) -> "Webhook":
        """Raises WebhookInvalid for another scheme than http(s), or a secret of another form."""
        try:
            parts = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise WebhookInvalid(f"The webhook {url!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise WebhookInvalid(f"The webhook {url!r} is no http:// or https:// URL.")
        return cls(url, _key(secret))


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    low, high = SECRET_BYTES
    if not secret.startswith(SECRET_PREFIX) or not low <= len(key) <= high:
        raise WebhookInvalid(  # without the secret itself
            f"WARDROBE_WEBHOOK_SECRET has to be {SECRET_PREFIX} and the base64 of {low} to {high} "
            f'random bytes. Make one with: echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'
        )
    return key


def signed(key: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers that prove who sent a body, and when."""
    text = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.digest(key, text, hashlib.sha256)).decode()
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


class Deliveries:
    """The loop that tells, from `start` to `stop`. `count` hears how each attempt ended."""

    def __init__(self, outbox: Outbox, webhook: Webhook, count: Callable[[str], None]) -> None:
        self._outbox = outbox
        self._webhook = webhook
        self._count = count
        self._begun = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, follow_redirects=False) as client:
            while True:
                try:
                    told = await self._tell_one(client)
                except StoreUnavailable as error:
                    log.warning("decisions cannot be read: %s", error.message)
                    told = False
                except Exception:
                    log.exception("a decision could not be told, trying again")
                    told = False
                if not told:
                    await asyncio.sleep(POLL_SECONDS)

    async def _tell_one(self, client: httpx.AsyncClient) -> bool:
        """Tell the oldest decision that waits, with all its attempts; False when none waits."""
        if not self._begun:
            await asyncio.to_thread(self._outbox.begin)
            self._begun = True
        message = await asyncio.to_thread(self._outbox.take, LEASE_SECONDS)
        if message is None:
            return False
        for wait in (*WAITS[message.attempts :], None):
            error = await self._attempt(client, message)
            await asyncio.to_thread(self._note, message.seq, error, wait)
            self._count("failed" if error else "delivered")
            if not error or wait is None:
                break
            await asyncio.sleep(wait)
        return True

    def _note(self, seq: int, error: str, wait: float | None) -> None:
        if not error:
            return self._outbox.end(seq, "delivered")
        log.warning("webhook decision=%d failed: %s", seq, error)
        if wait is None:
            log.error("webhook decision=%d is given up", seq)
            return self._outbox.end(seq, "given up", error)
        return self._outbox.failed(seq, error, wait + LEASE_SECONDS)

    async def _attempt(self, client: httpx.AsyncClient, message: Message) -> str:
        """Send once; return why it failed, or nothing."""
        event = {"type": "experiment.decision", "timestamp": message.data["at"]}
        body = msgspec.json.encode({**event, "data": message.data})
        headers = signed(self._webhook.key, f"dec_{message.seq}", int(time.time()), body)
        try:
            async with client.stream(
                "POST", self._webhook.url, content=body, headers=headers
            ) as answer:
                return "" if answer.is_success else f"HTTP {answer.status_code}"
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"[:200]
