"""What a server found out about its shadows is written once, whenever it ends."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from registry.adapter import AdapterName
from serving.experiments.experiment import Arm
from serving.shadow.comparison import Comparison
from serving.shadow.live import LiveShadows
from serving.shadow.pair import Pair
from serving.shadow.store import Comparisons

NAME = AdapterName("acme", "support")


class Slow(Comparisons):
    """Writes when it may."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.writing, self.go_on = threading.Event(), threading.Event()

    def find(self, *, running: bool = False, namespace: str | None = None) -> list[Comparison]:
        return []  # none to be taken up: this is about what was found

    def record(self, found: Sequence[Pair], missed: Mapping[tuple[str, str], int]) -> None:
        self.writing.set()
        assert self.go_on.wait(10)
        super().record(found, missed)


def test_a_server_that_ends_while_it_writes_counts_nothing_twice(tmp_path: Path) -> None:
    arms = Arm("control", 0.5, NAME, 1, "a" * 64), Arm("treatment", 0.5, NAME, 2, "b" * 64)
    with Slow(tmp_path) as store:
        shadow = store.start(NAME, *arms, 1.0, "test")
        live = LiveShadows(store, *(None,) * 3, lambda _: None)  # type: ignore[arg-type]  # unused

        async def scenario() -> None:
            live.miss(shadow, "busy")
            live.take(Pair(shadow.id, "k1", "u"))
            await live.start()
            assert await asyncio.to_thread(store.writing.wait, 10)
            live.miss(shadow, "late")
            stopping = asyncio.create_task(live.stop())
            await asyncio.sleep(0)
            store.go_on.set()
            await stopping

        asyncio.run(scenario())
        tally = store.tally(shadow)
    assert (tally.pairs, tally.skipped) == (1, {"busy": 1, "late": 1})
