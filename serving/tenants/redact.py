"""No key in what we write: clients put keys into paths and fields, and messages repeat them."""

import logging
import re

_SECRET = re.compile(r"(wr_[0-9a-f]{12}_)[0-9a-f]+")


def redact(text: str) -> str:
    """Return the text with the public part alone of every key in it, whole or cut off."""
    return _SECRET.sub(r"\1***", text)


class RedactingFormatter(logging.Formatter):
    """Whatever is logged, tracebacks of libraries too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
