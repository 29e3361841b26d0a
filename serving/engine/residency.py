"""Getting adapters into slots: who waits, who is evicted, who is drained for whom."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from registry.adapter import AdapterRef
from serving.engine.boundary import AdapterFiles, AdapterLoadFailed, LoadStage, ResidentAdapter
from serving.engine.loader import AdapterLoader, Load
from serving.engine.lora import HostAdapter, LoraStacks
from serving.engine.slots import Place, SlotTable
from serving.engine.vectors import Vectors

NEW_SECONDS = 0.25  # after a load call: a prompt that starts by then is what it was made for
# Adapters on the way at once, or in host memory for want of a slot; the loader bounds their bytes.
MAX_LOADS = 8
REFUSALS = 1024  # adapters without room that are remembered


@dataclass(slots=True)
class _Filling:
    """An adapter on its way into a slot."""

    load: Load  # which the loader counts as long as it is held
    written: int = 0  # of the adapter's numbers


@dataclass(frozen=True, slots=True)
class _Needs:
    """The room of an adapter."""

    bucket: int
    more: int  # pages, for what it has beside LoRA
    size_bytes: int


class Residency:
    """The slots and the way into them. Only the step thread calls it.

    When no place is free of pins, a digest that waits claims one: requests that come later for
    what is in it wait, so it drains and the claim is met. Without claims, a stream of requests for
    resident adapters could keep a slot pinned for ever. Who is asked for first in a pass chooses
    first: before those that claimed or began to load in an earlier pass and are asked for later.
    """

    def __init__(
        self, table: SlotTable, stacks: LoraStacks, loader: AdapterLoader, copy_bytes: int
    ) -> None:
        """Copy up to `copy_bytes` into slots between two steps: what runs waits for it."""
        self.table, self.stacks, self.loader = table, stacks, loader
        self.copy_bytes = copy_bytes
        self.loads = 0
        self.evictions = 0
        self.kept: set[str] = set()  # digests that stay in their slots whoever waits
        self._place_seconds = 0.0
        self._labels: dict[str, str] = {}
        self._placed_at: dict[str, float] = {}  # digest → when its slot was whole
        self._waits: dict[str, Load] = {}  # digest → its load, while somebody waits for it
        self._claims: dict[str, tuple[str, ...]] = {}  # waiting digest → those that drain for it
        self._filling: dict[str, _Filling] = {}  # digests whose slots are not whole yet
        self._refused: OrderedDict[str, _Needs] = OrderedDict()  # digest → what had no room
        self._asked: set[str] = set()  # in this pass
        self._copied = 0  # bytes, in this pass
        self._resident: tuple[ResidentAdapter, ...] = ()
        self._resident_at = 0

    def forget_unwanted(self, wanted: Iterable[str]) -> None:
        """Drop the loads and claims that nobody waits for; call around each pass."""
        digests = set(wanted)
        self._asked.clear()
        self._copied = 0
        for digest in self._filling.keys() - digests:
            self._evict(digest)
        self._waits = {d: load for d, load in self._waits.items() if d in digests}
        self._claims = {d: v for d, v in self._claims.items() if d in digests}
        self.loader.advance()

    def ensure(
        self,
        ref: AdapterRef,
        *,
        claim: bool = True,
        yielding: Callable[[], Collection[str]] = tuple,
    ) -> bool:
        """Tell whether the adapter is in a slot; work towards it when it is not.

        Call in the order in which requests should start. Without `claim` it takes only a slot that
        nobody wears. `yielding` gives the digests whose wearers would all make way: a slot with
        such is claimed before others. Raises AdapterLoadFailed.
        """
        if ref.digest in self.table:
            self._asked.add(ref.digest)
            return self._fill(ref.digest) and not self._drains(ref.digest)
        self._try_again(ref)
        self._come_first(ref.digest)
        self.prefetch(ref)
        load = self._waits.get(ref.digest)
        if load is None or not load.done():
            return False
        if error := load.exception():
            raise AdapterLoadFailed(str(error)) from error
        adapter = load.result()
        if failure := self._no_room(ref, needs := self._needs(adapter)):
            self._refuse(ref.digest, needs)
            del load, adapter  # the error holds what is known here, and may be held for long
            raise failure
        place = self._idle(adapter)
        if place is None:
            if claim:
                self._claim(adapter, yielding())
            return False
        self._place(ref, load, place)
        return self._fill(ref.digest)

    def is_loading(self, ref: AdapterRef) -> bool:
        """Tell whether somebody waits for the adapter and it is not in host memory yet."""
        load = self._waits.get(ref.digest)
        return load is not None and not load.done()

    def vectors(self, ref: AdapterRef) -> Vectors | None:
        """Return what a resident adapter has beside LoRA."""
        return self.stacks.vectors.get(self.table.slot_of(ref.digest))

    def share(self, ref: AdapterRef) -> float:
        """Return the size of a resident adapter over that of the linears it is worn by."""
        return self.stacks.layout.share(self.table.slot_of(ref.digest).bucket)

    def is_new(self, ref: AdapterRef) -> bool:
        """Tell whether a resident adapter is kept for somebody who asked a moment ago."""
        return ref.digest in self.kept and (
            time.monotonic() - self._placed_at[ref.digest] < NEW_SECONDS
        )

    def begin(self, ref: AdapterRef, ahead: int, files: AdapterFiles | None = None) -> Load | None:
        """Start a load for `prefetch` while a step still runs. The only method for any thread.

        `ahead` others have not been handed to `prefetch` yet. What it sees may be over when the
        step thread looks: a load too many or too few, which `prefetch` and `ensure` put right.
        """
        if ref.digest in self.table or len(self._waits) + ahead >= MAX_LOADS:
            return None
        if ref.digest in self._refused:
            return None
        if files is not None and not self._may_hold(files):
            return None
        return self.loader.load(ref, files)

    def prefetch(self, ref: AdapterRef, load: Load | None = None) -> None:
        """Start loading what is not in a slot; the request may wait for other things meanwhile.

        Only so many at once: adapters of all who wait could be more than the host's memory. A load
        is kept until the pass that sees its end: a failure is told to all who waited for it, even
        when the loader has forgotten it by then.
        """
        if ref.digest in self.table or ref.digest in self._waits or len(self._waits) >= MAX_LOADS:
            return
        if ref.digest in self._refused:
            return
        self._waits[ref.digest] = load or self.loader.load(ref)

    def keep(self, ref: AdapterRef) -> None:
        """Let nothing put an adapter out of the slot that `ensure` found it in.

        Raises AdapterLoadFailed.
        Room for one adapter of any rank is never kept: all others need it now and then.
        """
        kept = self.kept | {ref.digest}
        taken = {row for d in kept for row in self.table.slot_of(d).rows_of(self.table.highest)}
        if len(taken) >= self.table.rows(self.table.highest) or len(kept) >= self.table.most:
            raise AdapterLoadFailed(
                f"{ref.label} cannot be kept: room for one adapter of rank {self.table.highest} "
                f"must stay free for all others, and {len(self.kept)} are kept. Unload an adapter, "
                "or start the server with more --adapter-memory or --adapter-slots."
            )
        self.kept = kept

    @property
    def filling(self) -> bool:
        """Tell whether a slot is being written, and the next pass will go on with that."""
        return bool(self._filling)

    @property
    def in_memory(self) -> int:
        """How many adapters are in host memory and in no slot."""
        return self.loader.cached_beside(self.table)

    @property
    def used_bytes(self) -> int:
        """Of the slots that hold an adapter."""
        return self.table.used_pages * self.stacks.page_bytes

    def stages(self) -> tuple[LoadStage, ...]:
        placed = LoadStage("place", self.loads, self._place_seconds)
        return (*self.loader.stages(), placed)

    def draining_for(self, ref: AdapterRef | None) -> list[str]:
        """Return the digests that are still worn where this adapter is to go."""
        claimed = () if ref is None else self._claims.get(ref.digest, ())
        return [digest for digest in claimed if self.table.pins(digest)]

    def resident(self) -> tuple[ResidentAdapter, ...]:
        if self._resident_at != self.table.changes:  # hundreds of them, and asked at every step
            self._resident_at = self.table.changes
            self._resident = tuple(
                ResidentAdapter(digest, self._labels[digest], self.table.pins(digest))
                for digest in self.table.resident()
            )
        return self._resident

    def _come_first(self, digest: str) -> None:
        """Take the turn of a load that nobody has asked for in this pass, if all turns are taken.

        Who is asked for first should start first: a tenant with many adapters, or large ones, must
        not keep the only one of another tenant on the disk. Who gives up its turn for want of room
        stands behind, and is not in the way again in the next pass.
        """
        self._asked.add(digest)
        before: Collection[str] = ()
        if digest in self._waits:
            before = self.loader.before(digest)
        elif len(self._waits) >= MAX_LOADS:
            before = self._waits
        late = [d for d in reversed(self._waits) if d in before and d not in self._asked]
        if digest not in self._waits:
            # Any turn will do. One that has ended would be read again, or has a failure to tell.
            late.sort(key=lambda d: self._waits[d].done())
        if late:
            del self._waits[late[0]]
            self._claims.pop(late[0], None)

    def _may_hold(self, files: AdapterFiles) -> bool:
        """Tell whether a load may begin that holds its files from the first moment on."""
        size = sum(map(len, files.weights))
        return self.loader.running < MAX_LOADS and self.loader.has_room(size)

    def _place(self, ref: AdapterRef, load: Load, place: Place) -> None:
        """Give the adapter a slot; who has to leave for that leaves."""
        for digest in place.leaving:
            self._evict(digest)
        self._claims.pop(ref.digest, None)
        self._drop_claims(place)
        self.table.place(ref.digest, place.slot)
        self._labels[ref.digest] = ref.label
        self._filling[ref.digest] = _Filling(load)
        del self._waits[ref.digest]

    def _fill(self, digest: str) -> bool:
        """Go on copying into a slot as far as this pass may; tell whether it is whole."""
        filling = self._filling.get(digest)
        if filling is None:
            return True
        started, left = time.monotonic(), self.copy_bytes - self._copied
        if left <= 0:
            return False
        slot, before, adapter = self.table.slot_of(digest), filling.written, filling.load.result()
        filling.written = self.stacks.load(slot, adapter, before, left)
        self._copied += (filling.written - before) * adapter.weights.itemsize
        self._place_seconds += time.monotonic() - started
        if filling.written < len(adapter.weights):
            return False
        del self._filling[digest]
        self._placed_at[digest] = time.monotonic()
        self.loads += 1
        return True

    def _evict(self, digest: str) -> None:
        self.table.evict(digest)
        self._filling.pop(digest, None)
        self._placed_at.pop(digest, None)
        del self._labels[digest]
        self.evictions += 1

    def _idle(self, adapter: HostAdapter) -> Place | None:
        """Return a place that nobody wears anything of: the claimed one, else the least used."""
        mine = self._claims.get(adapter.digest, ())

        def order(place: Place) -> tuple[bool, bool]:
            return _apart(place.leaving, mine), any(map(self._drains, place.leaving))

        idle = (place for place in self._places(adapter) if not self._wearers(place))
        return min(idle, key=order, default=None)

    def _claim(self, adapter: HostAdapter, yielding: Collection[str]) -> None:
        """Let a place drain: one that is left at once if there is any, with few wearers."""
        mine = self._claims.get(adapter.digest, ())

        def cost(place: Place) -> tuple[bool, bool, int]:
            stays = any(self.table.pins(d) and d not in yielding for d in place.leaving)
            return stays, _apart(place.leaving, mine), self._wearers(place)

        if places := self._places(adapter):
            self._drop_claims(chosen := min(places, key=cost))
            self._claims[adapter.digest] = chosen.leaving

    def _try_again(self, ref: AdapterRef) -> None:
        """Raise AdapterLoadFailed, without a look at its files, while an adapter has no room."""
        if needs := self._refused.get(ref.digest):
            if failure := self._no_room(ref, needs):
                raise failure
            del self._refused[ref.digest]

    def _refuse(self, digest: str, needs: _Needs) -> None:
        del self._waits[digest]
        self._refused[digest] = needs
        if len(self._refused) > REFUSALS:
            self._refused.popitem(last=False)

    def _no_room(self, ref: AdapterRef, needs: _Needs) -> AdapterLoadFailed | None:
        """Return why an adapter would wait for ever, if it would.

        Any rank has room beside what is kept, but perhaps not with the vectors that come with it.
        """
        places = self.table.choices(needs.bucket, needs.more)
        if any(self.kept.isdisjoint(place.leaving) for place in places):
            return None
        held = "what is kept leaves no such room" if places else "there is no such room"
        return AdapterLoadFailed(
            f"{ref.label} takes {needs.size_bytes} bytes with all it has beside LoRA, in one "
            f"piece of adapter memory, and {held}. Start the server with more --adapter-memory."
        )

    def _needs(self, adapter: HostAdapter) -> _Needs:
        return _Needs(adapter.bucket, self.stacks.more_pages(adapter), adapter.size_bytes)

    def _choices(self, adapter: HostAdapter) -> list[Place]:
        return self.table.choices(adapter.bucket, self.stacks.more_pages(adapter))

    def _places(self, adapter: HostAdapter) -> list[Place]:
        """Return the choices without what is kept, and what who was asked for before has taken."""
        first = self._asked - {adapter.digest}
        claimed = (who for d, who in self._claims.items() if d in first)
        spared = self.kept.union(self._filling.keys() & first, *claimed)
        places = self._choices(adapter)
        return [place for place in places if spared.isdisjoint(place.leaving)]

    def _wearers(self, place: Place) -> int:
        return sum(map(self.table.pins, place.leaving))

    def _drains(self, digest: str) -> bool:
        return any(digest in leaving for leaving in self._claims.values())

    def _drop_claims(self, place: Place) -> None:
        self._claims = {d: who for d, who in self._claims.items() if _apart(who, place.leaving)}


def _apart(one: Sequence[str], other: Sequence[str]) -> bool:
    return set(one).isdisjoint(other)
