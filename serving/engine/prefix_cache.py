"""What prompts begin with, so that a few-shot prompt or a system text is read once.

Keys and values of a token depend on the tokens up to it, on the adapter that was worn and on
nothing else: sampling, grammars and other rows of the batch do not change them. So a block of 16
tokens is found by a SHA-256 over tenant, adapter digest and all tokens from the first to its last.
The tenant is in it so that nobody can learn from a fast answer what another tenant asks.

Blocks are copied: out of a slot when a step has filled them, into a slot when a request starts.
"""

import hashlib
from array import array
from collections import OrderedDict
from itertools import takewhile

from serving.engine.kv_cache import BLOCK, KVBlocks, KVCache
from serving.engine.sequence import Sequence


class PrefixCache:
    """Blocks by what they are of; each tenant's in order of use, the last used at the end.

    When no block is free, the tenant that has the most gives up the one that it used longest ago:
    a tenant with less than an equal share loses nothing to the others. A block is younger than all
    that continue it, so no block is ever without those before it.
    """

    def __init__(self, cache: KVCache, blocks: KVBlocks) -> None:
        self._cache, self._blocks = cache, blocks
        self.pages = blocks.pages
        self._tenants: dict[str, OrderedDict[bytes, int]] = {}  # key → number of the block
        self._used = 0  # blocks, the first ones; a used one goes on to another beginning at once
        self._spare: list[int] = []  # used ones that nothing is in
        self._reading: dict[bytes, Sequence] = {}  # what running requests are about to read
        self.asked = 0  # prompt tokens that were looked for
        self.found = 0

    @property
    def size_bytes(self) -> int:
        return (self._used - len(self._spare)) * self._blocks.size_bytes

    @property
    def capacity_bytes(self) -> int:
        return self._blocks.count * self._blocks.size_bytes

    def awaited(self, sequence: Sequence) -> bool:
        """Tell whether a running request is reading just what this one needs next.

        Whoever waits for it reads it once instead of twice, and starts at most as many steps later
        as the other one needs for what both have in common.
        """
        if sequence.kv_slot >= 0:
            return False  # it was paused and has its own
        if sequence.awaits not in self._reading:
            next_keys = self._keys(sequence)[len(self._known(sequence)) : _most(sequence)]
            sequence.awaits = next_keys[0] if next_keys else b""
        return sequence.awaits in self._reading

    def load(self, sequence: Sequence) -> None:
        """Copy the longest known beginning into the sequence's slot, which is new.

        At least one token is left to be read: what follows it is not kept.
        """
        known = self._known(sequence)
        self._blocks.read(known, self._cache, sequence.kv_slot)
        keys = self._keys(sequence)
        self._touch(sequence, keys[: len(known)])
        sequence.computed, sequence.kept = len(known) * BLOCK, len(known)
        if not sequence.read:  # else it was paused, and goes on
            sequence.cached = sequence.computed
            self.asked += sequence.prompt_length
            self.found += sequence.cached
        if self._blocks.count and sequence.request.priority == "normal":  # low ones may take long
            self._reading |= dict.fromkeys(keys[len(known) :], sequence)

    def store(self, sequence: Sequence) -> None:
        """Keep the blocks that the sequence has filled, as far as there is room.

        Call it after a step that did not fail. What is not finite is not kept.
        """
        full, kept = sequence.computed // BLOCK, sequence.kept
        if full == kept:
            return
        keys = self._keys(sequence)[:full]
        self._forget_reader(sequence, keys[kept:])
        self._touch(sequence, keys)
        if self._add(sequence, keys):
            sequence.kept = full
        self._touch(sequence, keys)

    def leave(self, sequence: Sequence) -> None:
        """Note that a sequence reads no more: it was paused, or it ended."""
        self._forget_reader(sequence, sequence.block_keys)

    def _keys(self, sequence: Sequence) -> list[bytes]:
        """Return the keys of all blocks that the sequence's tokens fill."""
        keys, tokens = sequence.block_keys, sequence.tokens
        last = keys[-1] if keys else _root(sequence)
        for start in range(len(keys) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            last = hashlib.sha256(last + array("q", tokens[start : start + BLOCK])).digest()
            keys.append(last)
        return keys

    def _known(self, sequence: Sequence) -> list[int]:
        """Return the blocks of the longest beginning that is here, short of the last token."""
        own = self._tenants.get(sequence.request.tenant, OrderedDict[bytes, int]())
        keys = self._keys(sequence)[: _most(sequence)]
        return [own[key] for key in takewhile(own.__contains__, keys)]

    def _add(self, sequence: Sequence, keys: list[bytes]) -> bool:
        """Keep what is not there yet; it is at the end, since no block is without those before.

        False: it is not finite, and none of it is kept. That is seen while it is copied.
        """
        tenant, chain = sequence.request.tenant, frozenset(keys)
        there = self._tenants.get(tenant, OrderedDict[bytes, int]())
        missing = [key for key in keys if key not in there]
        added: list[int] = []
        for key in missing:
            block = self._take(tenant, chain)
            if block is None:
                break
            self._tenants.setdefault(tenant, OrderedDict())[key] = block
            added.append(block)
        if self._blocks.write(added, self._cache, sequence.kv_slot, len(keys) - len(missing)):
            return True
        for key in missing[: len(added)]:
            self._spare.append(self._remove(tenant, key))
        return False

    def _take(self, tenant: str, chain: frozenset[bytes]) -> int | None:
        """Return a block to write; None when only the beginning itself could make room for it."""
        if self._spare:
            return self._spare.pop()
        if self._used < self._blocks.count:
            self._used += 1
            return self._used - 1
        if not self._tenants:
            return None  # a cache of no blocks
        most = max(self._tenants, key=lambda each: (len(self._tenants[each]), each == tenant))
        blocks = self._tenants[most]
        oldest = next(iter(blocks))
        if oldest in chain:
            return None
        return self._remove(most, oldest)

    def _remove(self, tenant: str, key: bytes) -> int:
        """Forget a block; returns its number."""
        blocks = self._tenants[tenant]
        block = blocks.pop(key)
        if not blocks:
            del self._tenants[tenant]
        return block

    def _touch(self, sequence: Sequence, keys: list[bytes]) -> None:
        """Make a beginning the last used of its tenant, its first block the youngest."""
        blocks = self._tenants.get(sequence.request.tenant, OrderedDict[bytes, int]())
        for key in reversed(keys):
            if key in blocks:
                blocks.move_to_end(key)

    def _forget_reader(self, sequence: Sequence, keys: list[bytes]) -> None:
        for key in keys:
            if self._reading.get(key) is sequence:
                del self._reading[key]


def _root(sequence: Sequence) -> bytes:
    """Return what tells whose beginning it is, and under which adapter."""
    digest = sequence.adapter.digest if sequence.adapter else None
    return hashlib.sha256(repr((sequence.request.tenant, digest)).encode()).digest()


def _most(sequence: Sequence) -> int:
    """Return how many blocks can be taken over: one token has to be read for what follows it."""
    return (len(sequence.tokens) - 1) // BLOCK
