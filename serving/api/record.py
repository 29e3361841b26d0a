"""What one request did: for the log line, the request log, the metrics and the response headers.

Never holds a key, and of what was said only what the tenant wants logged.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from serving.api.sequence import Piece
from serving.logs.entry import Transcript
from serving.shadow.live import Chosen
from serving.tenants.meter import Lease
from serving.tenants.redact import redact

SCOPE_KEY = "wardrobe.record"

log = logging.getLogger("wardrobe.request")


@dataclass(slots=True)
class RequestRecord:
    """Filled in while the request runs; written by one log line at its end."""

    request_id: str
    method: str
    path: str
    started: float = field(default_factory=time.monotonic)
    tenant: str = ""
    host_tenant: str = ""  # whose name the Host header is; a key of anybody else finds nothing
    endpoint: str = ""  # namespace/name of the one that was asked for
    label: str = ""
    digest: str = ""
    experiment: str = ""
    arm: str = ""  # its number
    status: int = 0  # 0: nothing was sent
    prompt_tokens: int = 0  # that the engine was given
    cached_tokens: int = 0  # of those, that it did not have to compute again
    completion_tokens: int = 0
    first_token: float | None = None  # seconds from the start
    finish_reasons: list[str] = field(default_factory=list[str])
    transcript: Transcript | None = None
    shadow: Chosen | None = None  # the candidate that answers as well, for nobody
    watchers: list[Callable[[Piece], None]] = field(default_factory=list)
    on_end: "list[Callable[[RequestRecord], None]]" = field(default_factory=list)
    lease: Lease | None = None  # of an inference request
    outcome: str = ""  # why it did not end normally: disconnect, drain, or an error code

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def failed(self) -> bool:
        """Whether the server failed it: with a 5xx, or with an error event in a stream."""
        broken = self.status < 400 and self.outcome not in ("", "disconnect")
        return self.status >= 500 or broken

    def write(self) -> None:
        """Settle what was reserved, tell whoever waits for the end, and write the log line."""
        if self.lease is not None:
            self.lease.settle(
                digest=self.digest,
                version=self.label,
                prompt=self.prompt_tokens,
                completion=self.completion_tokens,
            )
        for told in self.on_end:
            told(self)
        log.info(
            "id=%s tenant=%s method=%s path=%s status=%d endpoint=%s label=%s digest=%s "
            "prompt_tokens=%d completion_tokens=%d ms=%.1f outcome=%s",
            self.request_id,
            self.tenant or "-",
            self.method,
            # A path is client text: quoted by ascii() so that no line break forges a log line.
            redact(ascii(self.path[:200])),
            self.status,
            self.endpoint or "-",
            self.label or "-",
            self.digest[:16] or "-",
            self.prompt_tokens,
            self.completion_tokens,
            self.seconds * 1000,
            self.outcome or "ok",
        )


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def record_of(scope: Mapping[str, Any]) -> RequestRecord:
    """Return the record that the guard put into the scope."""
    return cast(RequestRecord, scope[SCOPE_KEY])
