"""Figures in a file, written when they are measured: a benchmark goes on where it was stopped."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Entries, a line of JSON each. Those of another device or setting do not count."""

    def __init__(self, path: Path, setting: str) -> None:
        self.path, self.setting = path, setting

    def __iter__(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = dict(json.loads(line))
                setting = entry.pop("setting")
            except (ValueError, TypeError, KeyError) as error:
                raise SystemExit(
                    f"{self.path}, line {number}, is not a figure of a benchmark: {line[:40]!r}. "
                    "Delete that line, or name another file."
                ) from error
            if setting == self.setting:
                yield entry

    def write(self, *entries: Mapping[str, object]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps({"setting": self.setting, **e}) + "\n" for e in entries)
