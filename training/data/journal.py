"""What generation has made so far: two files that are only appended to, so that it can go on.

    <out>                  accepted rows: {"messages": …, "group": …, "made": {…}} a line
    <out>.rejected         the others, with the reason and what the model said

`made` says where a row is from: how, by which model, with which seed and attempt, from which rows.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.data.folder import jsonl
from training.errors import DataError


class Journal:
    """The rows of one file of generated data."""

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        """Open, or go on with, a file. `facts` say how rows are made: another way is refused."""
        self._out = out
        self._rejected = out.with_name(f"{out.name}.rejected")
        self.facts = facts
        out.parent.mkdir(parents=True, exist_ok=True)
        self.accepted = self._read(self._out)
        rejected = self._read(self._rejected)
        self.reasons = Counter(row["reason"] for row in rejected)
        self.attempts = {row["made"]["attempt"] for row in (*self.accepted, *rejected)}

    def record(
        self, accepted: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]]
    ) -> None:
        """Append rows; they are on the disk when this returns."""
        for path, rows in ((self._rejected, rejected), (self._out, accepted)):
            with path.open("ab") as file:
                file.write(jsonl(rows))
                file.flush()
                os.fsync(file.fileno())
        self.accepted += accepted
        self.reasons.update(row["reason"] for row in rejected)
        self.attempts.update(row["made"]["attempt"] for row in (*accepted, *rejected))

    def _read(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a line that a crash cut off; its attempt is made again
            os.truncate(path, len(whole))
        rows = [json.loads(line) for line in whole.splitlines()]
        for row in rows:
            made = row.get("made", {})
            for key, value in self.facts.items():
                if made.get(key) != value:
                    raise DataError(
                        f"{path} holds rows made with {key} = {made.get(key)!r}, not {value!r}. "
                        "Give the options it was begun with, or another file."
                    )
        return rows
