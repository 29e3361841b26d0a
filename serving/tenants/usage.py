"""What was used, as it is asked for and shown."""

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Literal

from registry.errors import WardrobeError
from serving.tenants.standing import Period

By = Literal["hour", "day", "version"]
MOST_ROWS = 100_000  # of one question
DEFAULT_DAYS = 30

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}(-[0-9]{2}(T[0-9]{2})?)?")
_FORMATS = {7: "%Y-%m", 10: "%Y-%m-%d", 13: "%Y-%m-%dT%H"}


class SpanInvalid(WardrobeError):
    code = "invalid_time"


class TooManyRows(WardrobeError):
    code = "too_many_rows"


@dataclass(frozen=True, slots=True)
class Span:
    """From an hour, day or month to another, both included, as texts in UTC."""

    first: str
    last: str

    @classmethod
    def parse(cls, first: str | None, last: str | None, now: Period) -> "Span":
        """Read what was asked for; by default the last 30 days until now. Raises SpanInvalid."""
        start = Period(now.moment - timedelta(days=DEFAULT_DAYS)).day
        span = cls(
            start if first is None else _time(first), now.hour if last is None else _time(last)
        )
        # To compare what is not written to the same length: 2026-11 includes all of its days.
        if span.last < span.first[: len(span.last)]:
            raise SpanInvalid(f"The time from {span.first} to {span.last} ends before it begins.")
        return span


def _time(text: str) -> str:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        datetime.strptime(text, _FORMATS[len(text)])  # only whether there is such a day
    except ValueError:
        raise SpanInvalid(
            f"{text[:40]!r} is no time. Write an hour, a day or a month in UTC: 2026-11-25T13, "
            "2026-11-25 or 2026-11."
        ) from None
    return text


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one tenant used of one version under one name. `time` is empty for a whole span."""

    time: str
    tenant: str
    name: str
    version: str
    digest: str
    answers: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def facts(self) -> dict[str, str | int]:
        return {**asdict(self), "total_tokens": self.total_tokens}


def csv_of(rows: Iterable[UsageRow]) -> str:
    """Return the rows as CSV with a header (RFC 4180)."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*UsageRow.__dataclass_fields__, "total_tokens"])
    writer.writerows(row.facts().values() for row in rows)
    return out.getvalue()
