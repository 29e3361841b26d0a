"""How many files, and so connections, this process may have open."""

import resource
from contextlib import suppress

ENOUGH = 65_536  # several times what `max_requests` lets in; some systems have no hard limit


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one, up to ENOUGH.

    The soft one is often 1,024, for programs that call select(2), which breaks beyond it; nothing
    here calls it. Where the system refuses, the limit stays what it was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised(soft, hard), hard))


def raised(soft: int, hard: int) -> int:
    """Return the soft limit to set; RLIM_INFINITY is none."""
    if soft == resource.RLIM_INFINITY:
        return soft
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    return max(soft, most)
