"""How what a step gave reaches the callers, each of whom waits in an event loop of their own."""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from serving.engine.boundary import EngineError, TokenDelta
from serving.engine.core import Ticket

Item = TokenDelta | EngineError | None
TURN_SECONDS = 0.01  # that the next step waits at most for the loops to write what this one gave


class Stream:
    """Where one caller waits for what the step thread says."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Item] = asyncio.Queue()  # max_tokens bounds it
        self.started = time.monotonic()


def hand_over(
    items: Iterable[tuple[Stream, Item]], *, turns: int, meanwhile: Callable[[], None]
) -> Iterator[Stream]:
    """Put the items into their streams, one call for each loop; yield streams nobody reads.

    Each loop then has its `turns`, the first of which wakes the readers. A step computes on all
    cores of a CPU, and its threads meet some hundred times: a loop that writes beside it takes one
    core from one thread, and time from all of them. So the next step is waited with, and
    `meanwhile` is what one thread can do until then.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = defaultdict(list)
    for stream, item in items:
        by_loop[stream.loop].append((stream, item))
    told: list[threading.Event] = []
    for loop, own in by_loop.items():
        written = threading.Event()
        try:
            loop.call_soon_threadsafe(_put, own, written, turns)
        except RuntimeError:  # the caller's loop is closed
            yield from (stream for stream, _ in own)
        else:
            told.append(written)
    until = time.monotonic() + TURN_SECONDS
    meanwhile()
    for written in told if turns else ():
        written.wait(until - time.monotonic())


def _put(items: list[tuple[Stream, Item]], written: threading.Event, turns: int) -> None:
    """Wake the readers; set `written` some turns later, behind whom they wake."""
    for stream, item in items:
        stream.items.put_nowait(item)
    _after(turns, asyncio.get_running_loop(), written)


def _after(turns: int, loop: asyncio.AbstractEventLoop, written: threading.Event) -> None:
    if turns > 0:
        loop.call_soon(_after, turns - 1, loop, written)
    else:
        written.set()
