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
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            entry = json.loads(line)
            if entry.pop("setting") == self.setting:
                yield entry

    def write(self, *entries: Mapping[str, object]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps({"setting": self.setting, **e}) + "\n" for e in entries)
