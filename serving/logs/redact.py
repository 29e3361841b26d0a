"""Takes out of a text what looks like a key or a person's data. Best effort: see docs/logs.md.

The patterns of a tenant are searched under a time limit: a text that some pattern takes too long
for is not kept at all, rather than kept as it was.
"""

import regex

from registry.errors import WardrobeError
from serving.logs.entry import Contents

SEARCH_SECONDS = 0.1  # for one pattern in one text
MAX_PATTERNS = 20
MAX_PATTERN_CHARACTERS = 300

# In this order: a key or an IBAN has digits in it.
BUILT_IN = {
    "key": r"\b(?:wr_[0-9a-f]{12}_[0-9a-f]{64}|sk-[A-Za-z0-9_-]{20,})\b",
    "email": r"[\w.%+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}",
    "iban": r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
    "ip": r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b",
    "digits": r"\d(?:[ ()./-]{0,2}\d){6,}",  # telephone, card and account numbers
}
_NAME = regex.compile(r"[a-z][a-z0-9_-]{0,31}")


class PatternInvalid(WardrobeError):
    """A pattern that cannot be searched for."""

    code = "pattern_invalid"


class RedactionTooSlow(Exception):
    """A pattern did not come to an end in time, so the text must not be kept."""


class Redactor:
    """Replaces what fits a pattern by the pattern's name in brackets."""

    def __init__(self, patterns: dict[str, str]) -> None:
        """`patterns` come after the built-in ones. Raises PatternInvalid."""
        if len(patterns) > MAX_PATTERNS:
            raise PatternInvalid(f"{len(patterns)} patterns; {MAX_PATTERNS} are the most.")
        both = [*BUILT_IN.items(), *patterns.items()]
        self._patterns = [(f"[{name}]", _compile(name, text)) for name, text in both]

    def contents(self, contents: Contents) -> Contents:
        """Raises RedactionTooSlow."""
        prompt = tuple(
            {part: text if part == "role" else self.text(text) for part, text in said.items()}
            for said in contents.prompt
        )
        return Contents(prompt, tuple(map(self.text, contents.answers)))

    def text(self, text: str) -> str:
        """Raises RedactionTooSlow."""
        for mark, pattern in self._patterns:
            try:
                # `concurrent`: the interpreter lock is free meanwhile, so no request waits.
                text = pattern.sub(
                    lambda _, mark=mark: mark, text, timeout=SEARCH_SECONDS, concurrent=True
                )
            except TimeoutError as error:
                raise RedactionTooSlow(f"{mark} took more than {SEARCH_SECONDS} s") from error
        return text


def _compile(name: str, text: str) -> "regex.Pattern[str]":
    if not _NAME.fullmatch(name):
        raise PatternInvalid(
            f"{name!r} cannot name a pattern: use 1 to 32 of a-z 0-9 _ - that start with a letter."
        )
    if not 1 <= len(text) <= MAX_PATTERN_CHARACTERS:
        raise PatternInvalid(
            f"The pattern {name} has {len(text)} characters; 1 to {MAX_PATTERN_CHARACTERS} are "
            "taken."
        )
    try:
        return regex.compile(text)
    except regex.error as error:
        raise PatternInvalid(f"The pattern {name}, {text!r}, cannot be read: {error}.") from error
