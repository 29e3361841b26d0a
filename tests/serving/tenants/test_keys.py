import asyncio
import re
from pathlib import Path

import pytest

from registry.errors import StoreUnavailable
from registry.records import KeyRecord
from registry.store import Registry
from serving.tenants.keys import (
    SCOPES,
    InvalidKey,
    KeyRing,
    Principal,
    ScopeMissing,
    ensure_operator_key,
    hash_key,
    new_key,
    rotate_operator_key,
)
from tests.serving.live import Wardrobe


def check(registry: Registry, text: str) -> Principal:
    return asyncio.run(KeyRing(registry).check(text))


def test_the_first_operator_key_is_made_once(wardrobe: Wardrobe) -> None:
    key = ensure_operator_key(wardrobe.registry)
    assert key is not None
    assert re.fullmatch(r"wr_[0-9a-f]{12}_[0-9a-f]{64}", key)
    assert ensure_operator_key(wardrobe.registry) is None
    principal = check(wardrobe.registry, key)
    assert principal.scopes == set(SCOPES)


def test_the_store_never_holds_the_key(wardrobe: Wardrobe, tmp_path: Path) -> None:
    key = ensure_operator_key(wardrobe.registry)
    assert key is not None
    secret = key.rpartition("_")[2].encode()
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert files
    assert not any(secret in path.read_bytes() for path in files)


def test_rotation_ends_the_key_before(wardrobe: Wardrobe) -> None:
    old = ensure_operator_key(wardrobe.registry)
    assert old is not None
    new = rotate_operator_key(wardrobe.registry)
    check(wardrobe.registry, new)
    with pytest.raises(InvalidKey):
        check(wardrobe.registry, old)


@pytest.mark.parametrize(
    "text",
    ["", "wr_", "sk-123", "wr_000000000000_" + "0" * 64, "' OR 1=1 --", "wr_é", "\x00" * 80],
)
def test_what_is_no_key_is_refused_in_one_sentence(wardrobe: Wardrobe, text: str) -> None:
    with pytest.raises(InvalidKey, match="not valid here"):
        check(wardrobe.registry, text)


def test_a_right_id_with_a_wrong_secret_is_refused(wardrobe: Wardrobe) -> None:
    key = ensure_operator_key(wardrobe.registry)
    assert key is not None
    with pytest.raises(InvalidKey):
        check(wardrobe.registry, key[:-1] + ("0" if key[-1] != "0" else "1"))


def test_a_key_does_only_what_its_scopes_say(wardrobe: Wardrobe) -> None:
    key_id, text = new_key()
    wardrobe.registry.add_key(key_id, hash_key(text), "acme", ("infer",))
    principal = check(wardrobe.registry, text)
    principal.require("infer")
    with pytest.raises(ScopeMissing, match="'admin'"):
        principal.require("admin")


class LosableKeys:
    """The key part of a registry whose database can be lost."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.lost = False
        self.reads = 0

    def find_key(self, key_id: str) -> KeyRecord | None:
        self.reads += 1
        if self.lost:
            raise StoreUnavailable("the database is gone")
        return self.registry.find_key(key_id)


def test_a_known_key_works_while_the_database_is_lost(wardrobe: Wardrobe) -> None:
    key = rotate_operator_key(wardrobe.registry)
    store = LosableKeys(wardrobe.registry)
    ring = KeyRing(store)  # type: ignore[arg-type]  # the ring only looks keys up

    async def scenario() -> None:
        await ring.check(key)
        await ring.check(key)
        assert store.reads == 1, "asked again within a second"
        store.lost = True
        await asyncio.sleep(1.05)
        await ring.check(key)
        with pytest.raises(StoreUnavailable):
            await ring.check(new_key()[1])

    asyncio.run(scenario())
    assert store.reads == 3


def test_a_revoked_key_ends_within_a_second(wardrobe: Wardrobe) -> None:
    key = rotate_operator_key(wardrobe.registry)
    ring = KeyRing(wardrobe.registry)

    async def scenario() -> None:
        principal = await ring.check(key)
        assert principal.key_id is not None
        wardrobe.registry.revoke_key(principal.key_id)
        await asyncio.sleep(1.05)
        with pytest.raises(InvalidKey):
            await ring.check(key)

    asyncio.run(scenario())
