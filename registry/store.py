"""The registry: versions, numbers, aliases with history, and the files behind them."""

import secrets
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from registry import aliases, endpoints, fleet, keys, shares, versions
from registry.adapter import (
    PRODUCTION,
    AdapterName,
    AdapterRef,
    Selector,
    Version,
    check_alias,
    check_tenant,
)
from registry.base import Bases
from registry.blobs import Blobs
from registry.contents import WEIGHTS_NAME
from registry.database import Closing, Database
from registry.errors import Problem, StoreUnavailable, VersionNotFound, refused
from registry.gate import pass_gate
from registry.leftovers import sweep
from registry.materialize import FoundFiles, export, find_files, materialize
from registry.migrations import SCHEMA
from registry.records import (
    Alias,
    AliasMove,
    Endpoint,
    EndpointEvent,
    Event,
    KeyRecord,
    Push,
    Rollout,
    RolloutState,
    ServerRecord,
    Share,
    VerifyReport,
)
from registry.upload import UploadedFile, check_upload, copy_upload
from registry.verify import Progress, verify
from registry.whole import companions, refuse_whole

DATABASE_NAME = "registry.sqlite"


class Registry(Closing):
    """One store. Safe for threads and for several processes at once; close it after use."""

    def __init__(self, home: Path, bases: Bases, database: Database, blobs: Blobs) -> None:
        self.home = home
        self.bases = bases
        self._database = database
        self._blobs = blobs

    @classmethod
    def open(cls, home: Path, bases: Bases) -> "Registry":
        """Open the store in `home`, making it when it is new. Sweeps what dead pushes left."""
        try:
            home.mkdir(parents=True, exist_ok=True)
            blobs = Blobs.in_folder(home / "blobs")
            # Two processes that make the same database at once would disturb each other.
            with FileLock(home / ".open.lock"):
                database = Database(f"sqlite:///{home / DATABASE_NAME}", SCHEMA)
                database.prepare()
        except OSError as error:
            raise StoreUnavailable(
                f"The store in {home} cannot be opened: {error}. Use another --home."
            ) from error
        # Of pushes and fetches that died.
        sweep([*home.glob("staging/*"), *home.glob("versions/.tmp-*"), *blobs.unfinished()])
        return cls(home, bases, database, blobs)

    # Versions

    def push(self, source: Path, name: AdapterName, *, base: str | None = None, actor: str) -> Push:
        """Make the folder the next version of `name`; durable when this returns.

        Idempotent: content that is already there under this name is answered with that version.
        Raises Refused, BaseMismatch, BaseNotFound, NotFound or StoreUnavailable.
        """
        with self.staging() as staging:
            return self._store(staging, copy_upload(source, staging), name, base, actor)

    def push_staged(
        self,
        staging: Path,
        files: Iterable[UploadedFile],
        name: AdapterName,
        *,
        base: str | None = None,
        actor: str,
        passed: Callable[[Version], None] = lambda _: None,
    ) -> Push:
        """As `push`, with the files that were written into a folder of `staging`: none is copied.

        They are described as `IncomingFile` does it, and not hashed again. `passed` is told what
        the version will be once the gate has let it through; it is none yet, and has no number.
        """
        return self._store(staging, check_upload(staging, files), name, base, actor, passed)

    def _store(
        self,
        staging: Path,
        files: dict[str, UploadedFile],
        name: AdapterName,
        base: str | None,
        actor: str,
        passed: Callable[[Version], None] = lambda _: None,
    ) -> Push:
        through = pass_gate(staging, files, name, self.bases, base)
        passed(through.version)
        for file_name in through.version.files:
            file = through.files[file_name]
            self._blobs.put(file.path, file.sha256)
        return self._record(through.version, through.warnings, actor)

    @contextmanager
    def staging(self) -> Generator[Path, None, None]:
        """Yield a private folder on the store's own disk; it is gone afterwards."""
        folder = self.home / "staging" / secrets.token_hex(16)
        try:
            folder.mkdir(parents=True)
            yield folder
        except OSError as error:
            raise StoreUnavailable(f"Cannot take the files: {error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def adapters(self) -> list[AdapterName]:
        with self._database.read() as connection:
            return versions.list_names(connection)

    def newest(self) -> list[tuple[Version, int]]:
        """Return the newest version of every adapter and how many it has, by name."""
        with self._database.read() as connection:
            return versions.list_newest(connection)

    def versions(self, name: AdapterName) -> list[Version]:
        """Return the versions of an adapter, oldest first. Raises AdapterNotFound."""
        with self._database.read() as connection:
            return versions.list_versions(connection, name)

    def resolve(self, selector: Selector) -> Version:
        """Return the version that a selector means now.

        Raises AdapterNotFound, VersionNotFound, AliasNotFound, or Conflict for an ambiguous digest.
        """
        with self._database.read() as connection:
            return versions.resolve(connection, selector)

    def fetch(self, ref: AdapterRef) -> Path:
        """Return a folder with the checked files of a version's adapter. Made once per digest.

        Raises VersionNotFound, Refused when the version has no adapter, or IntegrityError when
        stored bytes are not what they were.
        """
        return materialize(self._adapter(ref), self._blobs, self.home / "versions")

    def find_files(self, ref: AdapterRef) -> FoundFiles:
        """Return the files of a version's adapter, to be read, and checked before they are used.

        Raises what `fetch` does, but for bytes that are not what they were: that the check does.
        """
        return find_files(self._adapter(ref), self._blobs, self.home / "versions")

    def materialized(self) -> int:
        """Return how many versions have their checked files in a folder, ready to be loaded."""
        return sum(not each.name.startswith(".") for each in self.home.glob("versions/*"))

    def pull(self, selector: Selector, destination: Path) -> Version:
        """Write a version to a new folder, with its card and README.

        A whole model gets the base's configuration and tokenizer beside it, so that it runs.
        """
        version = self.resolve(selector)
        beside = companions(self.bases.get(version.base_id)) if version.is_whole else []
        export(version, self._blobs, destination, beside)
        return version

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read and check everything; `progress` gets (bytes done, bytes in all)."""
        return verify(self._database, self._blobs, progress)

    # Aliases

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
    ) -> AliasMove:
        """Point an alias to a version; durable when this returns.

        Promoting what the alias points to already changes nothing. Raises VersionNotFound, and
        Conflict when the version did not pass its gate (unless `force`) or when the alias is not
        at `expected_generation` any more (0: not set yet).
        """
        check_alias(alias)
        _check_reason(reason)
        with self._database.write() as connection:
            return aliases.promote(
                connection,
                name,
                number,
                alias,
                reason=reason,
                actor=actor,
                force=force,
                expected_generation=expected_generation,
            )

    def rollback(
        self, name: AdapterName, *, alias: str = PRODUCTION, reason: str, actor: str
    ) -> AliasMove:
        """Undo the last promote of an alias that is not undone yet. Raises Conflict if none is."""
        check_alias(alias)
        _check_reason(reason)
        with self._database.write() as connection:
            return aliases.rollback(connection, name, alias, reason=reason, actor=actor)

    def aliases(self, name: AdapterName) -> list[Alias]:
        with self._database.read() as connection:
            return aliases.list_aliases(connection, name)

    def all_aliases(self) -> list[Alias]:
        with self._database.read() as connection:
            return aliases.list_aliases(connection)

    def aliased(self, base_id: str) -> list[tuple[str, Version]]:
        """Return every alias with its version, where that is one of a base; thousands at once."""
        with self._database.read() as connection:
            return versions.list_aliased(connection, base_id)

    def history(self, name: AdapterName, alias: str | None = None) -> list[Event]:
        """Return every move of the aliases of an adapter, oldest first."""
        with self._database.read() as connection:
            versions.list_versions(connection, name)
            return aliases.history(connection, name, alias)

    def events(self, after: int, limit: int = 1000) -> list[Event]:
        """Return the events with a higher number than `after`, oldest first."""
        with self._database.read() as connection:
            return aliases.list_events(connection, after, limit)

    def last_event(self) -> int:
        """Return the number of the newest event, 0 in an empty store."""
        with self._database.read() as connection:
            return aliases.last_event(connection)

    # Servers that follow the store

    def heartbeat(self, server_id: str, url: str) -> None:
        """Say that a server is alive; to be called at least every few seconds."""
        with self._database.write() as connection:
            fleet.heartbeat(connection, server_id, url)

    def servers(self) -> list[ServerRecord]:
        """Return the servers that were heard of within fleet.LIVE_SECONDS."""
        with self._database.read() as connection:
            return fleet.live_servers(connection)

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
    ) -> None:
        """Record how far a server is with the event that moved an alias."""
        with self._database.write() as connection:
            fleet.report_rollout(
                connection,
                server_id,
                name,
                alias,
                event_seq=event_seq,
                number=number,
                digest=digest,
                state=state,
                message=message,
                seconds=seconds,
            )

    def rollouts(self, name: AdapterName | None = None) -> list[Rollout]:
        """Return the latest report of every live server on every alias."""
        with self._database.read() as connection:
            return fleet.live_rollouts(connection, name)

    # API keys

    def add_key(
        self,
        key_id: str,
        secret_hash: str,
        tenant: str,
        scopes: tuple[str, ...],
        expires_at: str | None = None,
    ) -> KeyRecord:
        with self._database.write() as connection:
            return keys.add_key(connection, key_id, secret_hash, tenant, scopes, expires_at)

    def find_key(self, key_id: str) -> KeyRecord | None:
        """Return a key, valid or not: ask `valid_at`."""
        with self._database.read() as connection:
            return keys.find_key(connection, key_id)

    def keys(self) -> list[KeyRecord]:
        with self._database.read() as connection:
            return keys.list_keys(connection)

    def revoke_key(self, key_id: str) -> KeyRecord:
        """Revoke a key; idempotent. Raises NotFound."""
        with self._database.write() as connection:
            return keys.revoke_key(connection, key_id)

    def expire_key(self, key_id: str, moment: str) -> KeyRecord:
        """Let a key end at this time, or earlier where it already would. Raises NotFound."""
        with self._database.write() as connection:
            return keys.expire_key(connection, key_id, moment)

    # Shares between tenants

    def share(self, name: AdapterName, tenant: str) -> Share:
        """Let a tenant use an adapter of another one. Idempotent. Raises AdapterNotFound."""
        check_tenant(tenant)
        with self._database.write() as connection:
            return shares.share(connection, name, tenant)

    def unshare(self, name: AdapterName, tenant: str) -> bool:
        """Take a share back; running servers follow within a second. False: there was none."""
        with self._database.write() as connection:
            return shares.unshare(connection, name, tenant)

    def shares(self, name: AdapterName | None = None) -> list[Share]:
        with self._database.read() as connection:
            return shares.list_shares(connection, name)

    # Endpoints

    def create_endpoint(
        self,
        name: AdapterName,
        target: Selector | None,
        defaults: dict[str, Any],
        *,
        actor: str,
        reason: str = "",
    ) -> Endpoint:
        """Make a stable name for a target, None for the bare base; durable when this returns.

        Raises Conflict for a name that is taken, NotFound for a target that is not there or not the
        tenant's to use, Refused for one that cannot be worn. `defaults` are the caller's to check.
        """
        with self._database.write() as connection:
            return endpoints.create_endpoint(
                connection, name, target, defaults, actor=actor, reason=reason
            )

    def change_endpoint(
        self,
        name: AdapterName,
        target: Selector | None,
        defaults: dict[str, Any],
        *,
        actor: str,
        reason: str = "",
        expected_generation: int,
    ) -> Endpoint:
        """Replace target and defaults. Raises as `create_endpoint`, Conflict for a lost race."""
        with self._database.write() as connection:
            return endpoints.change_endpoint(
                connection,
                name,
                target,
                defaults,
                actor=actor,
                reason=reason,
                expected_generation=expected_generation,
            )

    def delete_endpoint(self, name: AdapterName, *, actor: str, reason: str = "") -> Endpoint:
        """Return what is gone now; its history stays. Raises EndpointNotFound."""
        with self._database.write() as connection:
            return endpoints.delete_endpoint(connection, name, actor=actor, reason=reason)

    def endpoint(self, name: AdapterName) -> Endpoint:
        """Raises EndpointNotFound."""
        with self._database.read() as connection:
            return endpoints.get_endpoint(connection, name)

    def endpoints(self, namespace: str | None = None) -> list[Endpoint]:
        """Return the endpoints of a tenant, or all, by name."""
        with self._database.read() as connection:
            return endpoints.list_endpoints(connection, namespace)

    def endpoint_history(self, name: AdapterName) -> list[EndpointEvent]:
        """Return every change of an endpoint, oldest first, also after its end."""
        with self._database.read() as connection:
            return endpoints.history(connection, name)

    def endpoint_events(self, after: int, limit: int = 1000) -> list[EndpointEvent]:
        """Return the changes with a higher number than `after`, oldest first."""
        with self._database.read() as connection:
            return endpoints.list_events(connection, after, limit)

    def last_endpoint_event(self) -> int:
        """Return the number of the newest change, 0 when there was none."""
        with self._database.read() as connection:
            return endpoints.last_event(connection)

    # Inside

    def _adapter(self, ref: AdapterRef) -> Version:
        """Return a version with these contents. Raises VersionNotFound, and Refused without one."""
        with self._database.read() as connection:
            version = versions.find_content(connection, ref.digest)
        if version is None:
            raise VersionNotFound(f"No version has the digest {ref.digest} ({ref.label}).")
        refuse_whole(version)
        if WEIGHTS_NAME not in version.files:
            text = f"{ref.label} is of the kind {version.kind!r}: it has no adapter to load."
            raise refused("no_adapter", text)
        return version

    def _record(self, version: Version, warnings: tuple[Problem, ...], actor: str) -> Push:
        """Give the version its number; version and event appear in one transaction."""
        with self._database.write() as connection:
            known = versions.find_digest(connection, version.name, version.digest)
            if known is None:
                number = versions.next_number(connection, version.name)
                version = replace(version, number=number)
                versions.add_version(connection, version)
                aliases.add_event(connection, "push", version, actor=actor)
                return Push(version, True, warnings)
        if known.card != version.card:
            text = f"{known.ref.label} has the same content; its card was kept, this one was not."
            warnings = (*warnings, ("card_not_stored", text))
        return Push(known, False, warnings)


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > 2000:
        text = "A move of an alias needs a reason of at most 2000 characters: --reason TEXT."
        raise refused("reason_missing", text)
    if not reason.isascii() and any("\ud800" <= char <= "\udfff" for char in reason):
        raise refused("reason_invalid", f"The reason {reason[:80]!r} is not written in UTF-8.")
