"""Which names in a Host header get in, and whose names they are.

A name says at most which tenant the key must be of; it never says who calls. Only `Host` is read:
X-Forwarded-Host and its like are text that anybody can send.
"""

import re
from dataclasses import dataclass

from registry.adapter import check_tenant
from registry.errors import InvalidName, WardrobeError
from serving.api.request_error import RequestError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_NAME = re.compile(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*|\[[0-9a-f:.]+\]")


class HostInvalid(WardrobeError):
    code = "host_invalid"


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """`api.example.com`, `acme.example.com=acme`, or `*.example.com`: the label is the tenant."""

    name: str
    tenant: str = ""  # empty: whoever has a key

    @classmethod
    def parse(cls, text: str) -> "AllowedHost":
        """Raises HostInvalid, InvalidName."""
        name, equals, tenant = text.partition("=")
        if not _NAME.fullmatch(name) or (equals and name.startswith("*")):
            raise HostInvalid(
                f"{text!r} is no host: write api.example.com, acme.example.com=acme or "
                "*.example.com, in small letters and without a port."
            )
        return cls(name, check_tenant(tenant) if equals else "")

    def match(self, host: str) -> str | None:
        """Return the tenant whose name this is, "" for everybody's, None for another host."""
        if not self.name.startswith("*"):
            return self.tenant if host == self.name else None
        label = host.removesuffix(self.name[1:])
        if label == host or "." in label:
            return None
        try:
            return check_tenant(label)
        except InvalidName:
            return None


def tenant_of_host(header: str, allowed: tuple[AllowedHost, ...]) -> str:
    """Return whose address a Host header names, "" for everybody's. Raises RequestError.

    A whole name goes before a `*`, in whatever order they are given.
    """
    host = _without_port(header).lower()
    if host in LOOPBACK_NAMES:
        return ""
    whole_first = sorted(allowed, key=lambda each: each.name.startswith("*"))
    found = (each.match(host) for each in whole_first)
    tenant = next((tenant for tenant in found if tenant is not None), None)
    if tenant is None:
        raise RequestError(
            f"This server does not answer to the name {host[:100]!r}. Whoever runs it can add "
            "names with --allow-host.",
            code="invalid_host",
        )
    return tenant


def _without_port(header: str) -> str:
    return header if header.endswith("]") else header.rsplit(":", 1)[0]
