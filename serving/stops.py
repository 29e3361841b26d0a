"""Stop strings, found in text that arrives in pieces.

Aho and Corasick (1975): one automaton over all stop strings reads every character once, however
many stop strings there are. Its state is the longest end of the text read so far that begins a
stop string, and that end is exactly what has to be held back.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    depth: int
    children: dict[str, "_Node"] = field(default_factory=dict[str, "_Node"])
    fail: "_Node | None" = None  # the longest proper end of this node that is a node, too
    matched: int = 0  # length of the longest stop string that ends here


class StopMatcher:
    """Lets text through up to the first stop string. The stop string itself is not let through."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Empty strings are refused: they would stop every answer before its first character."""
        assert all(stops), "the request schema refuses empty stop strings"
        self._root = self._node = _build(stops)
        self._held = ""
        self._passive = not stops
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show. After a match `stopped` is set."""
        if self._passive:
            return text
        assert not self.stopped, "nothing may follow a stop string"
        held = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            self._node = self._step(self._node, character)
            if self._node.matched:
                self.stopped = True
                self._held = ""
                return held[: position - self._node.matched]
        safe = len(held) - self._node.depth
        self._held = held[safe:]
        return held[:safe]

    def finish(self) -> str:
        """Return what was held back: no stop string can come any more."""
        held, self._held = self._held, ""
        self._node = self._root
        return held

    def _step(self, node: _Node, character: str) -> _Node:
        while character not in node.children:
            if node.fail is None:
                return node
            node = node.fail
        return node.children[character]


def _build(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for character in stop:
            node = node.children.setdefault(character, _Node(node.depth + 1))
        node.matched = len(stop)
    queue = deque(root.children.values())
    for child in root.children.values():
        child.fail = root
    while queue:
        node = queue.popleft()
        for character, child in node.children.items():
            fail = node.fail
            while fail is not None and character not in fail.children:
                fail = fail.fail
            child.fail = fail.children[character] if fail is not None else root
            child.matched = child.matched or child.fail.matched
            queue.append(child)
    return root
