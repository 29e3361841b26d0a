"""Amounts of memory as people write them."""

import re

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_memory(text: str) -> int:
    """Return the bytes of `512MiB`, `1.5GiB` or `0`. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?(\w*)", text.strip(), re.ASCII)
    amount, unit = match.groups() if match else ("", "")
    if not amount or (unit not in UNITS and amount != "0"):
        raise ValueError(f"{text[:40]!r} is no amount of memory: write 512MiB, 2GiB or 0.")
    return int(float(amount) * UNITS.get(unit, 1))


def format_memory(size: int) -> str:
    """Return what `parse_memory` reads as so many bytes, or up to a MiB more."""
    return f"{-(-size // UNITS['MiB'])}MiB"
