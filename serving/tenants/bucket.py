"""A token bucket: what was taken out of it, and when. Pure; the caller brings the clock.

A bucket that is full lets a burst of its whole size pass; after that it gains its size a minute.
What was taken is kept and not what is left, so that a new size is in force at once.
"""

import math
from dataclasses import dataclass, replace

SECONDS = 60.0  # in which an empty bucket fills
_ROUNDING = 1e-6  # a level is a sum of fractions: one that should be 3 may be 2.9999999


@dataclass(frozen=True, slots=True)
class Bucket:
    """Holds at most `size`. `at` is in seconds of the clock that also gives every `now`."""

    size: int
    taken: float
    at: float

    @classmethod
    def full(cls, size: int, now: float) -> "Bucket":
        return cls(size, 0.0, now)

    @property
    def level(self) -> float:
        return self.size - self.taken

    @property
    def remaining(self) -> int:
        """What may be taken now, in whole ones."""
        return math.floor(self.level + _ROUNDING)

    @property
    def seconds_to_full(self) -> float:
        return self.wait(self.size)

    def moved_to(self, now: float) -> "Bucket":
        """Return it as it is at `now`. A clock that was set back gains and loses nothing."""
        gained = max(0.0, now - self.at) * self.size / SECONDS
        return Bucket(self.size, min(float(self.size), max(0.0, self.taken - gained)), now)

    def wait(self, amount: float) -> float:
        """Return in how many seconds `amount` will be there; it must not be more than `size`."""
        return max(0.0, amount - self.level) * SECONDS / self.size

    def holds(self, amount: float) -> bool:
        return amount <= self.level + _ROUNDING

    def take(self, amount: float) -> "Bucket":
        """Return it with `amount` less; only what it holds may be taken."""
        assert self.holds(amount), (amount, self)
        return replace(self, taken=self.taken + amount)

    def give_back(self, amount: float) -> "Bucket":
        """Return what was taken and not used. What does not fit any more is lost."""
        return replace(self, taken=max(0.0, self.taken - amount))
