"""The registry: versions, numbers, aliases with history, and the files behind them."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from registry.adapter import PRODUCTION, AdapterName, AdapterRef, Selector, Version
from registry.base import Bases
from registry.records import (
    Alias,
    AliasMove,
    Event,
    KeyRecord,
    Push,
    Rollout,
    RolloutState,
    ServerRecord,
    VerifyReport,
)


class Registry:
    """One store. Safe for threads and for several processes at once; close it after use."""

    @classmethod
    def open(cls, home: Path, bases: Bases) -> "Registry":
        """Open the store in `home`, making it when it is new. Sweeps what dead pushes left."""
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # versions

    def push(
        self, source: Path, name: AdapterName, *, base: str | None = None, actor: str
    ) -> Push: ...
    def adapters(self) -> list[AdapterName]: ...
    def versions(self, name: AdapterName) -> list[Version]: ...
    def resolve(self, selector: Selector) -> Version: ...
    def fetch(self, ref: AdapterRef) -> Path: ...
    def pull(self, selector: Selector, destination: Path) -> Version: ...
    def verify(
        self, progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport: ...  # (bytes done, bytes in all)

    # aliases

    def promote(
        self,
        name: AdapterName,
        number: int,
        *,
        alias: str = PRODUCTION,
        reason: str,
        actor: str,
        force: bool = False,
        expected_generation: int | None = None,
    ) -> AliasMove: ...
    def rollback(
        self, name: AdapterName, *, alias: str = PRODUCTION, reason: str, actor: str
    ) -> AliasMove: ...
    def aliases(self, name: AdapterName) -> list[Alias]: ...
    def all_aliases(self) -> list[Alias]: ...
    def history(self, name: AdapterName, alias: str | None = None) -> list[Event]: ...
    def events(self, after: int, limit: int = 1000) -> list[Event]: ...
    def last_event(self) -> int: ...  # 0 in an empty store

    # servers that follow the store

    def heartbeat(self, server_id: str, url: str) -> None: ...
    def servers(self) -> list[ServerRecord]: ...
    def report_rollout(
        self,
        server_id: str,
        name: AdapterName,
        alias: str,
        *,
        event_seq: int,
        number: int,
        digest: str,
        state: RolloutState,
        message: str = "",
        seconds: float = 0.0,
    ) -> None: ...
    def rollouts(self, name: AdapterName | None = None) -> list[Rollout]: ...

    # API keys

    def add_key(
        self, key_id: str, secret_hash: str, tenant: str, scopes: tuple[str, ...]
    ) -> KeyRecord: ...
    def find_key(self, key_id: str) -> KeyRecord | None: ...
    def keys(self) -> list[KeyRecord]: ...
    def revoke_key(self, key_id: str) -> KeyRecord: ...
