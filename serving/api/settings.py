"""What can be set about the HTTP side."""

import ipaddress
import os
import secrets
from dataclasses import dataclass, field

from registry.errors import WardrobeError
from serving.api.hosts import AllowedHost
from serving.experiments.webhook import Webhook

KIB, MIB = 1024, 1024 * 1024


class UnsafeSettings(WardrobeError):
    code = "unsafe_settings"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Checked when it is made. Sizes are bytes, times are seconds."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    hosts: tuple[AllowedHost, ...] = ()  # names to answer to beside loopback's; none: to all
    auth: bool = True  # False makes everybody the operator; loopback only
    drain_timeout: float = 30.0  # how long running answers may go on after SIGTERM
    header_timeout: float = 10.0  # from connection to the end of the headers
    body_timeout: float = 30.0  # from the headers to the end of the body
    stall_timeout: float = 30.0  # how long a client may leave written bytes unread
    max_body_bytes: int = 4 * MIB
    max_push_bytes: int = 1024 * MIB  # of a pushed version, all its files together
    push_timeout: float = 600.0  # from the headers to the end of a push's body
    max_headers: int = 100
    max_header_bytes: int = 32 * KIB
    max_requests: int = 1024  # in flight at once; more get 503
    max_choices: int = 64  # prompts × n of one request
    default_max_tokens: int = 2048  # of a chat that names no limit
    webhook: Webhook | None = None  # who is told the decisions of experiments
    server_id: str = field(default_factory=lambda: f"{os.getpid()}-{secrets.token_hex(4)}")

    def __post_init__(self) -> None:
        if not self.auth and not self.on_loopback:
            raise UnsafeSettings(
                f"Without authentication the server only listens on loopback, not on {self.host}. "
                "Use --host 127.0.0.1, or leave authentication on."
            )

    @property
    def on_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False  # a name may resolve to anything

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
