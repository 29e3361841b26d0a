"""A call that is not written as JSON: what its readers share."""

import json
from collections.abc import Callable

from serving.parameters import Arguments


class TextCall:
    """A call whose arguments are told as JSON while they are read."""

    def __init__(self, arguments_of: Callable[[str], Arguments]) -> None:
        """`arguments_of`: the arguments of a tool, by its name."""
        self._arguments_of = arguments_of
        self.name: str | None = None
        self.begun = False  # it is known to be a call
        self.over = False  # at its end, or not what it should be
        self._key: str | None = None  # of the argument that is read now
        self._known: set[str] = set()  # keys that were given: of two values the first one counts
        self._told: list[str] = []  # not taken yet

    def read(self, text: str) -> int:
        """Read up to the tool's name, the call's end, or what needs more text.

        Return how many characters that were.
        """
        at, named = 0, self.name is not None
        while not self.over and (self.name is not None) == named:
            after = self._read_on(text, at)
            if after == at:
                break
            at = after
        return at

    def _read_on(self, text: str, at: int) -> int:
        """Read one piece from `at` on; return where it ends, `at` if it needs more text."""
        raise NotImplementedError

    def take(self) -> str:
        """Return the arguments' text that was not taken yet."""
        taken = "".join(self._told)
        self._told = []
        return taken

    def _begin_argument(self, key: str) -> None:
        self._key = key
        self._say(f"{', ' if self._known else '{'}{json.dumps(key)}: ")

    def _say(self, text: str) -> None:
        if self._key not in self._known:
            self._told.append(text)

    def _end_argument(self) -> None:
        self._known.add(str(self._key))
        self._key = None

    def _end_call(self) -> None:
        self.over = True
        self._told.append("}" if self._known else "{}")
