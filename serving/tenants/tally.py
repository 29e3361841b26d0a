"""What the answers of this server hold and have used, until the database has it."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.tenants.limit import Subject


@dataclass(frozen=True, slots=True)
class UsageKey:
    """One row of the usage roll-up."""

    tenant: str
    name: str  # what was called
    digest: str  # what ran
    version: str  # how it is called: acme/support@v7
    hour: str  # in which the answer ended, UTC: 2026-11-25T13


@dataclass(frozen=True, slots=True)
class Amount:
    answers: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.answers + other.answers,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Holding:
    """What one subject's answers hold here."""

    answers: int = 0
    tokens: int = 0  # reserved, or used and not yet written


@dataclass(frozen=True, slots=True)
class Batch:
    """What is taken out of the tally to be written in one transaction."""

    usage: Mapping[UsageKey, Amount] = field(default_factory=dict[UsageKey, Amount])
    used: Mapping[Subject, int] = field(default_factory=dict[Subject, int])
    unused: dict[Subject, int] = field(default_factory=dict[Subject, int])  # to be given back

    def __bool__(self) -> bool:
        return bool(self.usage or self.unused)


@dataclass(slots=True)
class Tally:
    """Safe for threads. Its size is bounded by the tenants, names, versions and hours in use."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _holdings: dict[Subject, Holding] = field(default_factory=dict[Subject, Holding])
    _usage: dict[UsageKey, Amount] = field(default_factory=dict[UsageKey, Amount])
    _used: dict[Subject, int] = field(default_factory=dict[Subject, int])
    _unused: dict[Subject, int] = field(default_factory=dict[Subject, int])

    def holding(self, subject: Subject) -> Holding:
        return self._holdings.get(subject, Holding())

    def holdings(self) -> dict[Subject, Holding]:
        with self._lock:
            return dict(self._holdings)

    def hold(self, subject: Subject, answers: int, tokens: int) -> None:
        """Add to what a subject's answers hold; less than nothing takes it away."""
        with self._lock:
            self._hold(subject, answers, tokens)

    def _hold(self, subject: Subject, answers: int, tokens: int) -> None:
        before = self.holding(subject)
        after = Holding(before.answers + answers, before.tokens + tokens)
        assert after.answers >= 0, (subject, after)
        assert after.tokens >= 0, (subject, after)
        if after == Holding():
            self._holdings.pop(subject, None)
        else:
            self._holdings[subject] = after

    def settle(
        self, subjects: tuple[Subject, ...], reserved: int, key: UsageKey | None, amount: Amount
    ) -> None:
        """End one answer: what it used stays held until it is written, the rest is free."""
        unused = reserved - amount.tokens
        with self._lock:
            for subject in subjects:
                self._hold(subject, -1, -unused)
                if unused:
                    self._unused[subject] = self._unused.get(subject, 0) + unused
                if amount.tokens:
                    self._used[subject] = self._used.get(subject, 0) + amount.tokens
            if key is not None:
                known = self._usage.get(key)
                self._usage[key] = known + amount if known else amount

    def take_unused(self, subject: Subject) -> int:
        """Return what is to be given back to a subject's bucket, once."""
        with self._lock:
            return self._unused.pop(subject, 0)

    def put_unused(self, subject: Subject, tokens: int) -> None:
        """Undo `take_unused`."""
        if tokens:
            with self._lock:
                self._unused[subject] = self._unused.get(subject, 0) + tokens

    def take(self) -> Batch:
        """Return all that is to be written; what was used is held until `release`."""
        with self._lock:
            batch = Batch(self._usage, self._used, self._unused)
            self._usage, self._used, self._unused = {}, {}, {}
            return batch

    def release(self, batch: Batch) -> None:
        """End `take`: what was used is written."""
        with self._lock:
            for subject, tokens in batch.used.items():
                self._hold(subject, 0, -tokens)

    def put(self, batch: Batch) -> None:
        """Undo `take`: the batch could not be written."""
        with self._lock:
            for subject, tokens in batch.used.items():
                self._used[subject] = self._used.get(subject, 0) + tokens
            for subject, tokens in batch.unused.items():
                self._unused[subject] = self._unused.get(subject, 0) + tokens
            for key, amount in batch.usage.items():
                known = self._usage.get(key)
                self._usage[key] = known + amount if known else amount
