"""Getting adapters into slots: who waits, who is evicted, who is drained for whom."""

import time
from collections.abc import Iterable

import torch

from registry.adapter import AdapterRef
from serving.engine.boundary import AdapterLoadFailed, LoadStage, ResidentAdapter
from serving.engine.loader import AdapterLoader, Load
from serving.engine.lora import HostAdapter, LoraStacks
from serving.engine.slots import SlotTable

MAX_LOADS = 8  # adapters on the way at once, or in host memory for want of a slot


class Residency:
    """The slots and the way into them. Only the step thread calls it.

    When every slot is pinned, the digest that waits longest claims the least used one: requests
    that come later for that digest wait, so it drains and the claim is met. Without claims,
    a stream of requests for resident adapters could keep a slot pinned for ever.
    """

    def __init__(self, table: SlotTable, stacks: LoraStacks, loader: AdapterLoader) -> None:
        self.table, self.stacks, self.loader = table, stacks, loader
        self.loads = 0
        self.evictions = 0
        self.kept: set[str] = set()  # digests that stay in their slots whoever waits
        self._place_seconds = 0.0
        self._labels: dict[str, str] = {}
        self._waits: dict[str, Load] = {}  # digest → its load, while somebody waits for it
        self._claims: dict[str, str] = {}  # waiting digest → resident digest that drains for it
        self._asked: set[str] = set()  # in this pass

    def forget_unwanted(self, wanted: Iterable[str]) -> None:
        """Drop the loads and claims that nobody waits for; call around each pass."""
        digests = set(wanted)
        self._asked.clear()
        self._waits = {d: load for d, load in self._waits.items() if d in digests}
        self._claims = {d: v for d, v in self._claims.items() if d in digests}

    def ensure(self, ref: AdapterRef, *, claim: bool = True) -> bool:
        """Tell whether the adapter is in a slot; work towards it when it is not.

        Call in the order in which requests should start. Without `claim` it takes only a slot that
        nobody wears. Raises AdapterLoadFailed.
        """
        if ref.digest in self.table:
            return ref.digest not in self._claims.values()
        self._come_first(ref.digest)
        self.prefetch(ref)
        load = self._waits.get(ref.digest)
        if load is None or not load.done():
            return False
        if error := load.exception():
            raise AdapterLoadFailed(str(error)) from error
        if not self._make_room(ref.digest, claim=claim):
            return False
        self._claims.pop(ref.digest, None)  # met, also when what comes now cannot be placed
        self._place(ref, load.result())
        del self._waits[ref.digest]
        self.loads += 1
        return True

    def prefetch(self, ref: AdapterRef) -> None:
        """Start loading what is not in a slot; the request may wait for other things meanwhile.

        Only so many at once: adapters of all who wait could be more than the host's memory. A load
        is kept until the pass that sees its end: a failure is told to all who waited for it, even
        when the loader has forgotten it by then.
        """
        if ref.digest in self.table or ref.digest in self._waits or len(self._waits) >= MAX_LOADS:
            return
        self._waits[ref.digest] = self.loader.load(ref)

    def keep(self, ref: AdapterRef) -> None:
        """Let nothing put an adapter out of the slot that `ensure` found it in.

        Raises AdapterLoadFailed.
        One slot is never kept: every other adapter needs one now and then.
        """
        if len(self.kept | {ref.digest}) >= self.table.capacity:
            raise AdapterLoadFailed(
                f"{ref.label} cannot be kept: {len(self.kept)} of {self.table.capacity} adapter "
                "slots are kept, and one stays free for all others. Unload an adapter, or start "
                "the server with more --adapter-slots."
            )
        self.kept.add(ref.digest)

    @property
    def in_memory(self) -> int:
        """How many adapters are in host memory and in no slot."""
        return self.loader.cached_beside(self.table.resident())

    def stages(self) -> tuple[LoadStage, ...]:
        placed = LoadStage("place", self.loads, self._place_seconds)
        return (*self.loader.stages(), placed)

    def claimed_for(self, ref: AdapterRef | None) -> str | None:
        """Return the digest that drains so that this adapter can have its slot."""
        return None if ref is None else self._claims.get(ref.digest)

    def resident(self) -> tuple[ResidentAdapter, ...]:
        return tuple(
            ResidentAdapter(digest, self._labels[digest], self.table.pins(digest))
            for digest in self.table.resident()
        )

    def _come_first(self, digest: str) -> None:
        """Take the turn of a load that nobody has asked for in this pass, if all turns are taken.

        Who is asked for first should start first: a tenant with many adapters must not keep the
        only one of another tenant on the disk.
        """
        self._asked.add(digest)
        if digest not in self._waits and len(self._waits) >= MAX_LOADS:
            later = next((d for d in reversed(self._waits) if d not in self._asked), None)
            if later is not None:
                del self._waits[later]
                self._claims.pop(later, None)

    def _place(self, ref: AdapterRef, adapter: HostAdapter) -> None:
        """Copy into a slot, or leave no trace: the first of a rank may not fit the device."""
        started = time.monotonic()
        slot = self.table.place(ref.digest, adapter.bucket)
        try:
            self.stacks.load(slot, adapter)
        except torch.AcceleratorError:
            raise  # the device's context is lost
        except Exception as error:
            self.table.evict(ref.digest)
            raise AdapterLoadFailed(
                f"{ref.label} cannot be put into a slot of rank {adapter.bucket}: {error}"
            ) from error
        self._place_seconds += time.monotonic() - started
        self._labels[ref.digest] = ref.label

    def _make_room(self, digest: str, *, claim: bool) -> bool:
        if len(self.table) < self.table.capacity:
            return True
        taken = {v for d, v in self._claims.items() if d != digest} | self.kept
        idle = [d for d in self.table.idle() if d not in taken]
        mine = self._claims.get(digest)
        if idle:
            self._evict(mine if mine in idle else idle[0])
            return True
        if mine is None and claim:
            free = [d for d in self.table.resident() if d not in taken]
            if free:
                self._claims[digest] = min(free, key=self.table.pins)
        return False

    def _evict(self, digest: str) -> None:
        self.table.evict(digest)
        del self._labels[digest]
        self.evictions += 1
