"""Where a tenant stands at one moment, and what one more answer would do to it. Pure."""

import calendar
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

from serving.tenants.bucket import Bucket
from serving.tenants.limit import (
    BudgetSpent,
    Limit,
    LimitReached,
    NeverFits,
    Subject,
    TooManyAtOnce,
)

TRY_AGAIN_SECONDS = 1  # when an answer must end first: nobody knows when


@dataclass(frozen=True, slots=True)
class Period:
    """The day and the month of a moment, in UTC."""

    moment: datetime

    @classmethod
    def now(cls) -> "Period":
        return cls(datetime.now(UTC))

    @property
    def hour(self) -> str:
        return self.moment.strftime("%Y-%m-%dT%H")

    @property
    def day(self) -> str:
        return self.hour[:10]

    @property
    def month(self) -> str:
        return self.hour[:7]

    @property
    def seconds_of_day(self) -> int:
        """Return how long the day goes on."""
        midnight = self.moment.replace(hour=0, minute=0, second=0, microsecond=0)
        return math.ceil((midnight + timedelta(days=1) - self.moment).total_seconds())

    @property
    def seconds_of_month(self) -> int:
        days = calendar.monthrange(self.moment.year, self.moment.month)[1]
        return self.seconds_of_day + (days - self.moment.day) * 86400


@dataclass(slots=True)
class Clock:
    """Where the time comes from: of buckets in seconds, of budgets by the calendar."""

    seconds: Callable[[], float] = time.monotonic
    period: Callable[[], Period] = Period.now


@dataclass(frozen=True, slots=True)
class Standing:
    """One subject's limit and how much of it is taken. A bucket is None where there is no limit."""

    subject: Subject
    limit: Limit
    period: Period
    requests: Bucket | None = None
    tokens: Bucket | None = None
    answers: int = 0  # that run now, on every server of this home
    held: int = 0  # tokens that are reserved, or used and not yet in the sums below
    day: int = 0  # tokens used in this day, and in this month
    month: int = 0

    def with_used(self, hour: str, tokens: int) -> "Standing":
        """Return it with what was used in an hour counted in its day and month."""
        return replace(
            self,
            day=self.day + (tokens if hour[:10] == self.period.day else 0),
            month=self.month + (tokens if hour[:7] == self.period.month else 0),
        )

    def enter(self) -> "Standing":
        """Take one request and one place. Raises LimitReached and TooManyAtOnce."""
        most = self.limit.concurrent
        if most is not None and self.answers >= most:
            raise TooManyAtOnce(
                f"{self.answers} answers of {self.subject} run, and {most} may at once. "
                "Try again when one has ended.",
                TRY_AGAIN_SECONDS,
            )
        requests = self.requests
        if requests is not None:
            if not requests.holds(1):
                raise _reached(
                    f"{self.subject} may send {requests.size} requests a minute", requests.wait(1)
                )
            requests = requests.take(1)
        return replace(self, requests=requests, answers=self.answers + 1)

    def reserve(self, prompt: int, answer: int) -> "Standing":
        """Take the most tokens that one request may use.

        Raises NeverFits for more than the limit ever allows, LimitReached and BudgetSpent.
        """
        wanted = prompt + answer
        asked = f"This request may use {wanted} tokens, {prompt} of its prompt and {answer} more"
        for most, per in self._per_span:
            if most is not None and wanted > most:
                raise NeverFits(
                    f"{asked}, and {self.subject} may use {most} a {per}: it can never run. "
                    "Ask for fewer tokens (`max_tokens`, `n`) or shorten the prompt."
                )
        tokens = self.tokens
        if tokens is not None:
            if not tokens.holds(wanted):
                raise _reached(
                    f"{asked}. {self.subject} may use {tokens.size} a minute and has "
                    f"{tokens.remaining} left",
                    tokens.wait(wanted),
                )
            tokens = tokens.take(wanted)
        self._check_budgets(wanted, asked)
        return replace(self, tokens=tokens, held=self.held + wanted)

    def facts(self) -> dict[str, object]:
        """Return what may be told of it."""
        return {
            "tenant": self.subject.tenant,
            "name": self.subject.name,
            **asdict(self.limit),
            "remaining_requests": self.requests.remaining if self.requests else None,
            "remaining_tokens": self.tokens.remaining if self.tokens else None,
            "running": self.answers,
            "reserved_tokens": self.held,
            "used_this_day": self.day,
            "used_this_month": self.month,
        }

    @property
    def _per_span(self) -> tuple[tuple[int | None, str], ...]:
        limit = self.limit
        return (
            (limit.tokens_per_minute, "minute"),
            (limit.tokens_per_day, "day"),
            (limit.tokens_per_month, "month"),
        )

    def _check_budgets(self, wanted: int, asked: str) -> None:
        for most, used, per, seconds in (
            (self.limit.tokens_per_day, self.day, "day", self.period.seconds_of_day),
            (self.limit.tokens_per_month, self.month, "month", self.period.seconds_of_month),
        ):
            if most is not None and used + self.held + wanted > most:
                raise BudgetSpent(
                    f"{asked}. {self.subject} may use {most} in this {per}, and {used + self.held} "
                    f"are used or reserved. The next {per} begins in {seconds} seconds (UTC).",
                    seconds,
                )


def _reached(sentence: str, wait: float) -> LimitReached:
    seconds = max(1, math.ceil(wait))
    return LimitReached(f"{sentence}. Try again in {seconds} seconds.", seconds)


def headers_of(standings: Iterable[Standing]) -> list[tuple[bytes, bytes]]:
    """Return the `x-ratelimit-*` headers of the OpenAI API, each kind for its tightest bucket."""
    found = list(standings)
    headers: list[tuple[bytes, bytes]] = []
    for kind in ("requests", "tokens"):
        buckets = [bucket for s in found if (bucket := getattr(s, kind)) is not None]
        if not buckets:
            continue
        tightest = min(buckets, key=lambda bucket: bucket.level)
        for what, value in (
            ("limit", str(tightest.size)),
            ("remaining", str(tightest.remaining)),
            ("reset", f"{math.ceil(tightest.seconds_to_full * 1000) / 1000:g}s"),
        ):
            headers.append((f"x-ratelimit-{what}-{kind}".encode(), value.encode()))
    return headers
