"""What a tenant may use, and the ways of being told that it is too much.

LimitReached         not now: `retry_after` says when it may be tried again
├── TooManyAtOnce    as many answers run as may run
└── BudgetSpent      the tokens of the day or the month
NeverFits            more than the limit ever allows at once: trying again does not help
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from registry.adapter import AdapterName, check_tenant
from registry.errors import WardrobeError

EVERYBODY = "*"  # in the place of a tenant: each tenant that has no limit of its own
WHOLE = ""  # in the place of a name: all that a tenant asks for
BASE_NAME = "base"  # the name of the base model; adapters have a slash in theirs
MOST = 10**12


class LimitInvalid(WardrobeError):
    code = "limit_invalid"


class LimitReached(WardrobeError):
    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after  # seconds


class TooManyAtOnce(LimitReached):
    code = "too_many_at_once"


class BudgetSpent(LimitReached):
    code = "insufficient_quota"  # as the OpenAI API calls it


class NeverFits(WardrobeError):
    code = "exceeds_limit"


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is limited: a tenant, in all it asks for or under one name."""

    tenant: str
    name: str = WHOLE

    @classmethod
    def parse(cls, tenant: str, name: str | None) -> "Subject":
        """Read what a person wrote. The namespace of the tenant's own names may be left out.

        Raises InvalidName and LimitInvalid.
        """
        if tenant == EVERYBODY:
            if name is not None:
                raise LimitInvalid(
                    f"A limit of {EVERYBODY!r} is for all names; leave {name!r} out."
                )
            return cls(EVERYBODY)
        check_tenant(tenant)
        if name is None or name == BASE_NAME:
            return cls(tenant, name or WHOLE)
        return cls(tenant, str(AdapterName.parse(name, tenant)))

    def __str__(self) -> str:
        return f"{self.tenant} with {self.name}" if self.name else self.tenant


@dataclass(frozen=True, slots=True)
class Limit:
    """None is no limit. Checked when it is made; raises LimitInvalid."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None  # answers that run at once
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 1 <= value <= MOST:
                raise LimitInvalid(f"{field.name} is {value}; it takes 1 to {MOST}.")

    def changed(self, values: Mapping[str, int | None]) -> "Limit":
        """Return it with these fields replaced."""
        return Limit(**{**asdict(self), **values})

    def over(self, below: "Limit") -> "Limit":
        """Return it with what it leaves open taken from another one."""
        mine = {name: value for name, value in asdict(self).items() if value is not None}
        return below.changed(mine)

    def __str__(self) -> str:
        values = zip((getattr(self, field.name) for field in fields(self)), WORDS, strict=True)
        return ", ".join(f"{value} {words}" for value, words in values if value) or "none"

    @property
    def has_budget(self) -> bool:
        return self.tokens_per_day is not None or self.tokens_per_month is not None


WORDS = ("requests a minute", "tokens a minute", "at once", "tokens a day", "tokens a month")

# So that there is always something to tell in the headers; far above what one server answers.
BUILT_IN = Limit(requests_per_minute=100_000, tokens_per_minute=100_000_000)
