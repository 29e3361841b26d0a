"""A length of time as people write it: 90d, 12h, 30m, 45s."""

import re
from datetime import timedelta

from registry.errors import WardrobeError

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_SPAN = re.compile(r"([1-9][0-9]{0,5})([smhd])")


class DurationInvalid(WardrobeError):
    code = "duration_invalid"


def parse_duration(text: str) -> timedelta:
    match = _SPAN.fullmatch(text)
    if not match:
        raise DurationInvalid(
            f"{text!r} is no length of time. Write a number from 1 to 999999 and s, m, h or d: 90d."
        )
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
