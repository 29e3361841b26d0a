"""Every error the registry raises on purpose.

    WardrobeError                  code, message: what was wrong, with which value, what to do;
    │                              command: what to run, where there is a command line
    ├── InvalidName                a name, alias or selector that cannot be one
    ├── NotFound
    │   ├── AdapterNotFound
    │   ├── VersionNotFound
    │   ├── AliasNotFound
    │   ├── BaseNotFound
    │   ├── EndpointNotFound
    │   └── KeyNotFound
    ├── Refused                    the validation gate said no; `problems` lists every reason
    │   └── BaseMismatch           made for another base model
    ├── Conflict                   somebody else moved the alias first, or the gate forbids the move
    ├── IntegrityError             stored bytes are not what their digest says
    └── StoreUnavailable           the disk or the database cannot take or give data now

Domain code raises these; the HTTP status of each is decided in one table in `serving/api`,
the exit code in one place in `wardrobe.py`.
"""

from collections.abc import Sequence
from typing import Self

Problem = tuple[str, str]  # (code, sentence)

MAX_PROBLEMS = 100  # that a refusal lists: a file can be wrong in a million places
MAX_SENTENCES = 20  # of them in its message


class WardrobeError(Exception):
    """An error with a message for the person who caused it or can cure it.

    `command` is what to run about it. It is apart, because a caller over HTTP has no command line.
    """

    code = "wardrobe_error"

    def __init__(self, message: str, *, command: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.command = command


class InvalidName(WardrobeError):
    code = "invalid_name"


class NotFound(WardrobeError):
    code = "not_found"


class AdapterNotFound(NotFound):
    code = "adapter_not_found"


class VersionNotFound(NotFound):
    code = "version_not_found"


class AliasNotFound(NotFound):
    code = "alias_not_found"


class BaseNotFound(NotFound):
    code = "base_not_found"


class EndpointNotFound(NotFound):
    code = "endpoint_not_found"


class KeyNotFound(NotFound):
    code = "key_not_found"


class Refused(WardrobeError):
    """The validation gate refused the files; `problems` holds the reasons."""

    code = "adapter_refused"

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    @classmethod
    def because(cls, problems: Sequence[Problem]) -> Self:
        """Make a refusal for these reasons, of which MAX_PROBLEMS are listed."""
        texts = [text for _, text in problems[:MAX_SENTENCES]]
        if len(problems) > MAX_SENTENCES:
            texts.append("There are more problems.")
        listed = list(problems[:MAX_PROBLEMS])
        if len(problems) > MAX_PROBLEMS:
            listed.append(("not_listed", "There are more problems."))
        return cls(" ".join(texts), listed)


class BaseMismatch(Refused):
    code = "base_mismatch"


class Conflict(WardrobeError):
    code = "conflict"


class IntegrityError(WardrobeError):
    code = "integrity_error"


class StoreUnavailable(WardrobeError):
    code = "store_unavailable"


def refused(code: str, message: str) -> Refused:
    """Make a refusal that has exactly one problem."""
    return Refused.because([(code, message)])
