"""Words: adapter, version, alias, selector, and how their names are written.

    acme/support                  the version that `production` points to
    acme/support@canary           the version that the alias points to
    acme/support@v7               version 7
    acme/support@sha256:ab12…     the version with this digest (at least 8 hex digits)

A name without a namespace means the namespace `default`, or the caller's own on a server.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.contents import MODEL_NAME
from registry.errors import InvalidName

DEFAULT_NAMESPACE = "default"
PRODUCTION = "production"
BASE = "base"  # as a model: the bare base

_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})")
_DIGEST = re.compile(r"sha256:([0-9a-f]{8,64})")

Kind = Literal["lora", "prompt", "full"]
Shot = tuple[str, str]  # an example in the prompt: what a user says, what is answered


@dataclass(frozen=True, slots=True)
class AdapterName:
    """`namespace/name`; the namespace is the tenant."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str, default: str = DEFAULT_NAMESPACE) -> "AdapterName":
        """Read a name; `default` is the namespace of one that names none."""
        namespace, slash, name = text.rpartition("/")
        if not slash:
            namespace = default
        for part in (namespace, name):
            check_name_part(part, text)
        return cls(namespace, name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Selector:
    """How a client names a version. Exactly one of alias, number and digest is set."""

    name: AdapterName
    alias: str | None = None
    number: int | None = None
    digest: str | None = None  # hex digits without the `sha256:` prefix, may be a prefix of one

    @classmethod
    def parse(cls, text: str, default: str = DEFAULT_NAMESPACE) -> "Selector":
        """Read a selector; `default` is the namespace of one that names none."""
        head, at, tail = text.partition("@")
        name = AdapterName.parse(head, default)
        if not at:
            return cls(name, alias=PRODUCTION)
        if match := _NUMBER.fullmatch(tail):
            return cls(name, number=int(match[1]))
        if match := _DIGEST.fullmatch(tail):
            return cls(name, digest=match[1])
        if tail.startswith("sha256:"):
            raise InvalidName(f"{tail[:80]!r} is no digest: write sha256: and 8 to 64 of 0-9 a-f.")
        return cls(name, alias=check_alias(tail))

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.name}@v{self.number}"
        if self.digest is not None:
            return f"{self.name}@sha256:{self.digest}"
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What the engine is asked to wear. The digest is the identity; the label is for people."""

    digest: str  # 64 hex digits
    label: str  # acme/support@v7


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable specialisation of a base model, as the registry stores it."""

    name: AdapterName
    number: int
    digest: str  # 64 hex digits, sha256 over the canonical manifest
    kind: Kind
    base_id: str  # logical id, never a path
    base_fingerprint: str  # of the weights it was made for, or "" when the maker did not record it
    rank: int  # highest LoRA rank of any module
    size_bytes: int
    created_at: str  # ISO 8601, UTC
    files: dict[str, str]  # path → sha256 hex of the stored bytes
    system_prompt: str = ""  # part of the identity, because it changes answers
    card: dict[str, Any] = field(default_factory=dict[str, Any])  # prompt, metrics, gate, lineage

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.digest, f"{self.name}@v{self.number}")

    @property
    def adapter(self) -> AdapterRef | None:
        """What the engine wears for it; None for a prompt, which runs on the bare base."""
        return None if self.kind == "prompt" else self.ref

    @property
    def is_whole(self) -> bool:
        """Whether it is a model of its own, which nothing can wear: see registry/whole.py."""
        return MODEL_NAME in self.files

    @property
    def examples(self) -> tuple[Shot, ...]:
        """The examples that go before a request's own messages: part of the identity."""
        return tuple(
            (said, answer) for said, answer in self.card.get("prompt", {}).get("examples", [])
        )

    @property
    def gate_failures(self) -> list[str]:
        """The reasons why this version may not be promoted; empty when its gate passed."""
        return list(self.card.get("gate", {}).get("failures", []))


def check_name_part(part: str, whole: str) -> str:
    if not _PART.fullmatch(part):
        raise InvalidName(
            f"{whole!r} is not an adapter name: {part!r} must be 1 to 63 of a-z 0-9 . _ - "
            "and start with a letter or digit. Write NAMESPACE/NAME, for example acme/support."
        )
    return part


def check_tenant(tenant: str) -> str:
    """A tenant is the namespace of its adapters."""
    if not _PART.fullmatch(tenant):
        raise InvalidName(
            f"{tenant!r} is not a tenant: use 1 to 63 of a-z 0-9 . _ - that start with a letter or "
            "digit, for example acme."
        )
    return tenant


def check_alias(alias: str) -> str:
    if re.fullmatch(r"v[0-9]+", alias):
        raise InvalidName(
            f"{alias[:80]!r} is no alias but a version number, and those go from v1 to v999999999."
        )
    if not _PART.fullmatch(alias):
        raise InvalidName(
            f"{alias!r} is not an alias: use 1 to 63 of a-z 0-9 . _ - that start with a letter or "
            "digit, for example production or canary."
        )
    return alias
