"""Whether answers are JSON, judged as they pass by."""

from dataclasses import dataclass, field

import msgspec


@dataclass(slots=True)
class Format:
    """The choices of one answer. Its text is kept until its end and no longer."""

    _texts: dict[int, str] = field(default_factory=dict[int, str])  # by the choice's index
    malformed: bool = False  # a choice that came to its end is not JSON

    def watch(self, index: int, text: str, *, ended: bool) -> None:
        whole = self._texts.pop(index, "") + text
        if not ended:
            self._texts[index] = whole
        elif not is_json(whole):
            self.malformed = True


def is_json(text: str) -> bool:
    """Tell whether a text is one JSON value, strictly: no fence around it, no words beside it."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
